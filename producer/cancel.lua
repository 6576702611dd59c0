-- cancel: queued jobs end at once, running ones are marked and their leader hears of it.
--
-- | key                        | type | here                       |
-- |----------------------------|------|----------------------------|
-- | job:{id}                   | hash | state read; ended, or marked |
-- | all of record.lua's finish |      |                            |
--
-- args: tenant ('' for any), then ids.  reply: each job's state after the call, '' if it does not exist for the tenant
local states = {}
even_when_full()
for i = 2, num_args do
  local id, job = arg(i), read(arg(i))
  if not job or (arg(1) ~= '' and job.tenant ~= arg(1)) then
    states[#states + 1] = ''
  else
    if overdue(job) then
      expired(id, job)
    elseif job.state == 'queued' then
      cancelled(id, job)
    elseif job.state == 'running' then
      redis.call('HSET', own .. 'job:' .. id, 'cancel', 1)
    end
    states[#states + 1] = job.state
  end
end
return states
