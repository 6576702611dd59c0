-- replay: dead letters go to their queue again, each with a clean record; all of the call or none.
--
-- | key                         | type   | here                                                        |
-- |-----------------------------|--------|-------------------------------------------------------------|
-- | letters                     | stream | read and taken out                                          |
-- | letter:{letter}, letters_bytes | string | read and dropped; counted                                |
-- | job:{id}                    | hash   | queued again; attempts go on counting, for they are fences  |
-- | journal:{id}, celery-task-meta-{id} | stream, string | dropped                                     |
-- | {model}, {model}\6\22{step} | list   | LPUSH of the message                                        |
-- | depth:{model}, models       | hash   | one more for the tenant; the model is listed                |
-- | deadlines                   | zset   | a fresh default one                                         |
--
-- args: letter ids.  reply: 'ok' and the job ids ('' where a letter has none), 'unknown' and the letter's id, or
--       'cut', the letter's id and how many bytes were kept of how many
local letters = {}
for i = 1, num_args do
  local entry = redis.call('XRANGE', own .. 'letters', arg(i), arg(i))[1]
  if not entry then return {'unknown', arg(i)} end
  letters[i] = letter_fields(entry)
  if letters[i].kept ~= letters[i].size then return {'cut', arg(i), letters[i].kept, letters[i].size} end
end

local function clean_record(id, f, message)
  local key, job = own .. 'job:' .. id, read(id)
  if job and not is_terminal(job.state) then return false end
  local attempt = job and job.attempt or 0
  redis.call('HDEL', key, 'claimed', 'first', 'finished', 'tokens', 'code', 'error', 'seal')
  redis.call('HSET', key, 'state', 'queued', 'model', f.model, 'tenant', job and job.tenant or f.tenant,
    'attempt', attempt, 'free', attempt, 'enqueued', now, 'deadline', set_deadline(id, DEFAULT_DEADLINE_MS),
    'rows', rows_of(message))
  redis.call('PERSIST', key)
  forget(id)
  count_queued(f.model, job and job.tenant or f.tenant, 1)
  return true
end

even_when_full()
local ids = {}
for i, f in ipairs(letters) do
  local message = letter_message(arg(i), f)
  drop_letter(arg(i), f)
  if f.job == '' or clean_record(f.job, f, message) then
    insist('HSETNX', own .. 'models', f.model, 0)
    redis.call('LPUSH', queue(f.model, f.step), message)
  end
  ids[i] = f.job
end
return {'ok', unpack(ids)}
