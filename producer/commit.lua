-- commit: end attempts.  Only the current attempt of a running job may; others are fenced and change nothing.
--
-- | key                          | type   | here                                                  |
-- |------------------------------|--------|-------------------------------------------------------|
-- | job:{id}                     | hash   | fence read; terminal state, and `seal` of the outcome |
-- | journal:{id}                 | stream | the last tokens, before it is closed                  |
-- | all of record.lua's finish   |        |                                                       |
--
-- args, for each outcome: id attempt state seal result code message, and of the last chunk, '' without one:
--       index tokens_after chunk
-- reply: 1 committed, 0 fenced.  The same outcome again (its reply was lost) is committed, not fenced.
local verdicts = {}
even_when_full()

-- Nothing may stop the end half-way: a journal that does not take the chunk is closed without it.
local function append_rest(id, job, index, after, chunk)
  if index == '' or tonumber(index) ~= job.tokens then return end
  redis.pcall('XADD', own .. 'journal:' .. id, after .. '-0', 'c', chunk)
  redis.call('HSET', own .. 'job:' .. id, 'tokens', after)
  if index == '0' then redis.call('HSETNX', own .. 'job:' .. id, 'first', now) end
  job.tokens = tonumber(after)
end

for i = 1, num_args, 10 do
  local id, attempt, state, seal = arg(i), tonumber(arg(i + 1)), arg(i + 2), arg(i + 3)
  local job = read(id)
  local verdict = 0
  if job and job.attempt == attempt then
    if job.state == 'running' then
      append_rest(id, job, arg(i + 7), arg(i + 8), arg(i + 9))
      finish(id, job, state, arg(i + 5), arg(i + 6), arg(i + 4), seal)
      verdict = 1
    elseif job.state == state and redis.call('HGET', own .. 'job:' .. id, 'seal') == seal then
      verdict = 1
    end
  end
  verdicts[#verdicts + 1] = verdict
end
return verdicts
