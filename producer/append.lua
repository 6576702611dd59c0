-- append: journal the tokens of one step, for all its jobs.
--
-- | key          | type   | here                                                        |
-- |--------------|--------|-------------------------------------------------------------|
-- | job:{id}     | hash   | fence read; tokens and the time of the first one written    |
-- | journal:{id} | stream | one entry <tokens after>-0 with the chunk                   |
-- | all of record.lua's finish | | of a job whose journal takes nothing: it alone fails  |
--
-- args, for each job: id attempt index tokens_after chunk
-- reply: ids to cancel, ids that are no longer the caller's
-- A journal with a gap is none: neither a reader nor the next attempt could go on from it.
local function fail(id)
  local job = read(id)
  if job then damaged(id, job, 'its journal') end
  return false
end

local cancel, lost = {}, {}
even_when_full()
for i = 1, num_args, 5 do
  local id, attempt, index, after, chunk = arg(i), arg(i + 1), arg(i + 2), arg(i + 3), arg(i + 4)
  local key, journal = own .. 'job:' .. id, own .. 'journal:' .. id
  local v = peek('HMGET', key, 'state', 'attempt', 'tokens', 'cancel') or {}
  local tokens, ours = v[3] or '0', v[1] == 'running' and v[2] == attempt
  if ours and tokens == index then
    if after ~= index and is_error(redis.pcall('XADD', journal, after .. '-0', 'c', chunk)) then
      ours = fail(id)
    else
      redis.call('HSET', key, 'tokens', after)
      if index == '0' then redis.call('HSETNX', key, 'first', now) end
    end
  elseif ours then -- the same call again because its reply was lost, or a leader that has lost count
    local found = peek('XRANGE', journal, after .. '-0', after .. '-0')
    ours = found and found[1] ~= nil and found[1][2][2] == chunk or not found and fail(id)
  end
  if not ours then lost[#lost + 1] = id elseif v[4] then cancel[#cancel + 1] = id end
end
return {cancel, lost}
