-- letters: the dead letters, newest first.
--
-- | key     | type   | here |
-- |---------|--------|------|
-- | letters | stream | read |
--
-- args: limit before ('' for the newest)
-- reply for each: letter id, model, job, reason, message, ms
local letters = {}
local from = arg(2) == '' and '+' or '(' .. arg(2)
for _, entry in ipairs(redis.call('XREVRANGE', own .. 'letters', from, '-', 'COUNT', arg(1))) do
  local f = {}
  for i = 1, #entry[2], 2 do f[entry[2][i]] = entry[2][i + 1] end
  letters[#letters + 1] = {entry[1], f.model, f.job, f.reason, f.message, f.at}
end
return letters
