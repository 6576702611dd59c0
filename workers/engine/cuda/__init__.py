"""The engine on CUDA: the llama family's layers as few kernels, paged attention, decode steps as CUDA graphs."""
