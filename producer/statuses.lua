-- statuses: the records of many jobs; one that is past its deadline with nobody to end it is ended here.
--
-- | key                        | type   | here                                    |
-- |----------------------------|--------|-----------------------------------------|
-- | job:{id}                   | hash   | read                                    |
-- | celery-task-meta-{id}      | string | read: the result text lives there, once |
-- | all of record.lua's finish |        | for overdue jobs                        |
--
-- args: tenant ('' for any), bytes of results at which to stop, then ids
-- reply for each, or for the first few, at least one: '' if it does not exist for the tenant, or
--   state model tenant attempt free enqueued claimed first finished tokens metadata code error deadline result
local found = {}
local bytes, most = 0, tonumber(arg(2))
for i = 3, num_args do
  local id = arg(i)
  local key = own .. 'job:' .. id
  local function record()
    return peek('HMGET', key, 'state', 'model', 'tenant', 'attempt', 'free', 'enqueued', 'claimed', 'first',
      'finished', 'tokens', 'metadata', 'code', 'error', 'deadline') or {}
  end
  local v = record()
  if not v[1] or (arg(1) ~= '' and v[3] ~= arg(1)) then
    found[#found + 1] = ''
  else
    if STATES[v[1]] == nil or v[14] and not is_terminal(v[1]) then
      local job = read(id)
      if job and overdue(job) then
        even_when_full()
        expired(id, job)
      end
      if job and job.state ~= v[1] then v = record() end
    end
    if v[1] == 'succeeded' then v[15] = peek('GET', namespace .. 'celery-task-meta-' .. id) end
    found[#found + 1] = v
    bytes = bytes + #(v[15] or '')
    if bytes >= most then break end
  end
end
return found
