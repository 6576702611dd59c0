-- letters: the dead letters, newest first, each with the first bytes of its message.
--
-- | key     | type   | here |
-- |---------|--------|------|
-- | letters | stream | read |
--
-- args: limit before ('' for the newest)
-- reply for each: letter id, model, job, reason, head of the message, ms, size of the message as it came
local letters = {}
local from = arg(2) == '' and '+' or '(' .. arg(2)
for _, entry in ipairs(redis.call('XREVRANGE', own .. 'letters', from, '-', 'COUNT', arg(1))) do
  local f = letter_fields(entry)
  letters[#letters + 1] = {entry[1], f.model, f.job, f.reason, f.head:sub(1, LETTER_HEAD_BYTES), f.at, f.size}
end
return letters
