-- release: hand leased jobs back before they are done, journal kept.
--
-- | key                                  | type | here                                        |
-- |--------------------------------------|------|---------------------------------------------|
-- | job:{id}                             | hash | fence read; queued again, or ended          |
-- | all of record.lua's crashed, drained |      |                                             |
--
-- args: reason (drained or crashed), then for each lease: id attempt
-- From last to first, so that the first of the call is served first.
for i = num_args - 1, 2, -2 do
  local id, job = arg(i), read(arg(i))
  if job and job.state == 'running' and job.attempt == tonumber(arg(i + 1)) then
    if arg(1) == 'crashed' then crashed(id, job) else drained(id, job) end
  end
end
return 1
