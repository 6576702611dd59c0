-- append: journal the tokens of one step, for all its jobs.
--
-- | key          | type   | here                                                        |
-- |--------------|--------|-------------------------------------------------------------|
-- | job:{id}     | hash   | fence read; tokens and the time of the first one written    |
-- | journal:{id} | stream | one entry <tokens after>-0 with the chunk                   |
--
-- args, for each job: id attempt index tokens_after chunk
-- reply: ids to cancel, ids that are no longer the caller's
local cancel, lost = {}, {}
even_when_full()
for i = 1, num_args, 5 do
  local id, attempt, index, after, chunk = arg(i), arg(i + 1), arg(i + 2), arg(i + 3), arg(i + 4)
  local key, journal = own .. 'job:' .. id, own .. 'journal:' .. id
  local v = redis.call('HMGET', key, 'state', 'attempt', 'tokens', 'cancel')
  local tokens, ours = v[3] or '0', v[1] == 'running' and v[2] == attempt
  if ours and tokens == index then
    if after ~= index then redis.call('XADD', journal, after .. '-0', 'c', chunk) end
    redis.call('HSET', key, 'tokens', after)
    if index == '0' then redis.call('HSETNX', key, 'first', now) end
  elseif ours then -- the same call again because its reply was lost, or a leader that has lost count
    local entry = redis.call('XRANGE', journal, after .. '-0', after .. '-0')[1]
    ours = entry ~= nil and entry[2][2] == chunk
  end
  if not ours then lost[#lost + 1] = id elseif v[4] then cancel[#cancel + 1] = id end
end
return {cancel, lost}
