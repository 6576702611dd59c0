-- commit: end attempts.  Only the current attempt of a running job may; others are fenced and change nothing.
--
-- | key                          | type   | here                                                  |
-- |------------------------------|--------|-------------------------------------------------------|
-- | job:{id}                     | hash   | fence read; terminal state, and `seal` of the outcome |
-- | all of record.lua's finish   |        |                                                       |
--
-- args, for each outcome: id attempt state seal result code message
-- reply: 1 committed, 0 fenced.  The same outcome again (its reply was lost) is committed, not fenced.
local verdicts = {}
even_when_full()
for i = 1, num_args, 7 do
  local id, attempt, state, seal = arg(i), tonumber(arg(i + 1)), arg(i + 2), arg(i + 3)
  local job = read(id)
  local verdict = 0
  if job and job.attempt == attempt then
    if job.state == 'running' then
      finish(id, job, state, arg(i + 5), arg(i + 6), arg(i + 4), seal)
      verdict = 1
    elseif job.state == state and redis.call('HGET', own .. 'job:' .. id, 'seal') == seal then
      verdict = 1
    end
  end
  verdicts[#verdicts + 1] = verdict
end
return verdicts
