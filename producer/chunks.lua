-- chunks: a job's journal from a token on.
--
-- | key          | type   | here |
-- |--------------|--------|------|
-- | journal:{id} | stream | read |
--
-- args: id after.  An entry's id is the number of tokens after it, so every entry beyond `after` is wanted.
local chunks = {}
for _, entry in ipairs(peek('XRANGE', own .. 'journal:' .. arg(1), '(' .. arg(2) .. '-0', '+') or {}) do
  if entry[2][1] == 'c' then chunks[#chunks + 1] = entry[2][2] end
end
return chunks
