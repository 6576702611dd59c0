-- renew: extend leases; the reply is how a leader hears of cancellations and of jobs that it lost.
--
-- | key            | type | here                                                              |
-- |----------------|------|-------------------------------------------------------------------|
-- | job:{id}       | hash | fence read                                                        |
-- | leases:{model} | zset | the new end of the lease; one that is late but not swept yet lives |
--
-- args: lease_ms, then for each lease: id attempt
-- reply: ids to cancel, ids that are no longer the caller's
local cancel, lost = {}, {}
local ends = now + tonumber(arg(1))
even_when_full()
for i = 2, num_args, 2 do
  local id = arg(i)
  local v = peek('HMGET', own .. 'job:' .. id, 'state', 'attempt', 'model', 'cancel') or {}
  if v[1] == 'running' and v[2] == arg(i + 1) and v[3] then
    insist('ZADD', own .. 'leases:' .. v[3], ends, id)
    if v[4] then cancel[#cancel + 1] = id end
  else
    lost[#lost + 1] = id
  end
end
return {cancel, lost}
