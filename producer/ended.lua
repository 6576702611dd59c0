-- ended: which of many jobs need not be waited for any more; far cheaper than their whole records.
--
-- | key                        | type | here             |
-- |----------------------------|------|------------------|
-- | job:{id}                   | hash | read             |
-- | all of record.lua's finish |      | for overdue jobs |
--
-- args: tenant ('' for any), then ids
-- reply: the places in that list, from 0, of jobs that are terminal or do not exist for the tenant
local ended = {}
local jobs, tenant = own .. 'job:', arg(1)
for i = 2, num_args do
  local id = arg(i)
  local v = peek('HMGET', jobs .. id, 'state', 'tenant', 'deadline') or {}
  if not v[1] or is_terminal(v[1]) or (tenant ~= '' and v[2] ~= tenant) then
    ended[#ended + 1] = i - 2
  elseif STATES[v[1]] == nil or v[3] and now >= whole(v[3]) then
    local job = read(id)
    if job and overdue(job) then
      even_when_full()
      expired(id, job)
    end
    if job and is_terminal(job.state) then ended[#ended + 1] = i - 2 end
  end
end
return ended
