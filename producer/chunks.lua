-- chunks: a job's journal from a token on.
--
-- | key          | type   | here |
-- |--------------|--------|------|
-- | journal:{id} | stream | read |
--
-- args: id after.  An entry's id is the number of tokens after it, so every entry beyond `after` is wanted.
-- reply: the entries; an empty one stands for what cannot be read.
local entries = peek('XRANGE', own .. 'journal:' .. arg(1), '(' .. arg(2) .. '-0', '+')
if not entries then return {''} end
local chunks = {}
for _, entry in ipairs(entries) do
  if entry[2][1] ~= 'state' then chunks[#chunks + 1] = entry[2][1] == 'c' and entry[2][2] or '' end
end
return chunks
