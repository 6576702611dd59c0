-- record: what every script shares; it is put in front of each of them.
--
-- | key                  | type   | here                                              |
-- |----------------------|--------|---------------------------------------------------|
-- | job:{id}             | hash   | read, ended, handed back                          |
-- | message:{id}         | string | dropped with the job's end, pushed back by drained|
-- | journal:{id}         | stream | closed with the job's end                         |
-- | celery-task-meta-{id}| string | written and published with the job's end; back in the queue it is dropped |
-- | leases:{model}       | zset   | left at the end of an attempt                     |
-- | deadlines            | zset   | joined with a deadline, left at the job's end     |
-- | suspects:{model}     | list   | joined after a crash, left at the job's end       |
-- | depth:{model}        | hash   | kept in step with the queue                       |
-- | letters              | stream | poison jobs and bad messages; the oldest fall out |
-- | letter:{letter}      | string | the message, if it is longer than the head        |
-- | letters_bytes        | string | how much they keep in all                         |
--
-- ARGV 1..10 are the same for all scripts; arg(i) is the i-th of the script's own.
local namespace = ARGV[1]
local own = namespace .. 'hortator:'
local RESULT_TTL_MS, JOURNAL_TTL_MS = tonumber(ARGV[2]), tonumber(ARGV[3])
local DATE_DONE = ARGV[4]
local MAX_ATTEMPTS, GRACE_MS, MAX_LETTERS = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])
local DEFAULT_DEADLINE_MS = tonumber(ARGV[8])
local MAX_LETTERS_BYTES, MAX_MESSAGE_BYTES = tonumber(ARGV[9]), tonumber(ARGV[10])
local LETTER_HEAD_BYTES, LETTER_CUT_BYTES = 512, 65536
local STEPS = {'0', '3', '6', '9'}

local function arg(i) return ARGV[10 + i] end
local num_args = #ARGV - 10

local clock = redis.call('TIME')
local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)

local function queue(model, step)
  if step == '0' then return namespace .. model end
  return namespace .. model .. '\6\22' .. step
end

-- Redis refuses a script that grows memory while it is over maxmemory, but only at the script's first write.  All
-- scripts except enqueue begin with a write that cannot grow it: what was accepted must be able to end even then.
local function even_when_full() redis.call('DEL', own .. 'nothing') end

-- What a submit is answered where the job could be evicted, or while running jobs and results need the rest of the
-- memory; nil while there is room.
local function no_room(headroom)
  local memory = redis.call('INFO', 'memory')
  local policy = memory:match('maxmemory_policy:(%S+)')
  if policy ~= 'noeviction' then return {'evicts', tostring(policy)} end
  local used, most = tonumber(memory:match('used_memory:(%d+)')), tonumber(memory:match('maxmemory:(%d+)'))
  if most > 0 and used > most * (1 - headroom) then return {'full_memory', used, most} end
  return nil
end

-- Keys may be damaged by anybody with access to this Redis.  One that is must cost no more than the job, or the model,
-- that it belongs to: a script that raises half-way would be tried again for ever, and all others with it.
local met = {} -- what was met, for the sweeper's log

local function is_error(reply) return type(reply) == 'table' and reply.err ~= nil end

local function note(key, problem) met[#met + 1] = key .. ': ' .. tostring(problem):sub(1, 80) end

-- A read of what may be of another type: nil then.
local function peek(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  if not is_error(reply) then return reply end
  note(key, reply.err)
  return nil
end

-- A call on bookkeeping that is rebuilt as work goes on: a key of another type makes room.
local function insist(command, key, ...)
  local reply = redis.pcall(command, key, ...)
  if not is_error(reply) then return reply end
  if reply.err:find('WRONGTYPE', 1, true) then
    note(key, reply.err)
    redis.call('DEL', key)
  end
  return redis.call(command, key, ...)
end

-- A whole number; what is none (also inf and nan) is 0.
local function whole(value)
  local n = tonumber(value or 0) or 0
  return n > -2 ^ 53 and n < 2 ^ 53 and math.floor(n) or 0
end

-- Of each state whether it is terminal.
local STATES = {queued = false, running = false, succeeded = true, failed = true, cancelled = true, expired = true}
local function is_terminal(state) return STATES[state] == true end

local damaged -- below

-- Nobody can tell how a job in an unknown state goes on, so it ends here.  Where it was is seen elsewhere.
local function end_unknown(id, job)
  note(own .. 'job:' .. id, 'unknown state')
  if redis.call('HEXISTS', own .. 'job:' .. id, 'finished') == 1 then
    job.state = 'new'
  else
    job.state = peek('ZSCORE', own .. 'leases:' .. job.model, id) and 'running' or 'queued'
  end
  damaged(id, job, 'its record')
end

-- Nil for what cannot be worked with: none, of another type, or without its model.
local function read(id)
  local v = peek('HMGET', own .. 'job:' .. id, 'state', 'model', 'tenant', 'attempt', 'free', 'tokens',
    'suspicion', 'alone', 'cancel', 'deadline', 'step', 'enqueued', 'rows')
  if not v or not v[1] or not v[2] then return nil end
  local enqueued = whole(v[12])
  local job = {state = v[1], model = v[2], tenant = v[3] or 'default', attempt = whole(v[4]), free = whole(v[5]),
    tokens = whole(v[6]), suspicion = whole(v[7]), alone = v[8] == '1', cancel = v[9] == '1',
    deadline = v[10] and whole(v[10]), step = v[11] or '0', enqueued = enqueued > 0 and enqueued or now,
    rows = math.max(1, whole(v[13]))}
  if STATES[job.state] == nil then end_unknown(id, job) end
  return job
end

local function message_of(id) return peek('GET', own .. 'message:' .. id) or nil end

local BASE64 = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/'
local ENVELOPE_BYTES = 65536 -- the most that a message may have beside its body
local MAX_ROWS = 16 -- schema.py's MAX_N
local MAX_TRIES = 100

local function from_base64(text)
  local bytes = {}
  for a, b, c, d in text:gmatch('(.)(.)(.)(.)') do
    local bits = 0
    for _, char in ipairs({a, b, c, d}) do bits = bits * 64 + (BASE64:find(char, 1, true) or 1) - 1 end
    bytes[#bytes + 1] = string.char(math.floor(bits / 65536), math.floor(bits / 256) % 256, bits % 256)
  end
  return table.concat(bytes)
end

-- For how many answers a message asks, each of which takes a row of the engine: the key "n" of its job, which no text
-- inside it can look like.  To decode a body of megabytes would stop Redis, so the key is looked for as base64 has it, by
-- the place in a group of four letters where it may begin; what stands there is decoded.
local function rows_of(message)
  local _, before = message:sub(1, ENVELOPE_BYTES):find('"body"%s*:%s*"')
  if not before then return 1 end
  local rows = 1
  local function count(n)
    n = whole(n)
    if n <= MAX_ROWS then rows = math.max(rows, n) end
  end
  if message:sub(before + 1, before + 1) == '[' then -- as it is, its quotes escaped
    for n in message:gmatch('\\"n\\"%s*:%s*(%d+)') do count(n) end
    return rows
  end
  for place, key in pairs({[0] = 'Im4i', [2] = 'JuI', [3] = 'ibiI'}) do
    local at = message:find(key, before + 1, true)
    for _ = 1, MAX_TRIES do
      if not at then break end
      if (at - before - 1) % 4 == place then
        count(from_base64(message:sub(at - place, at - place + 31)):match('"n"%s*:%s*(%d+)'))
      end
      at = message:find(key, at + 1, true)
    end
  end
  return rows
end

-- Every job has a deadline, so that it becomes terminal even if no worker ever comes.  Says when it is.
local function set_deadline(id, ms)
  local deadline = now + ms
  insist('ZADD', own .. 'deadlines', deadline, id)
  return deadline
end

local function count_queued(model, tenant, by)
  local key = own .. 'depth:' .. model
  local count = redis.pcall('HINCRBY', key, tenant, by)
  if is_error(count) then
    insist('HDEL', key, tenant) -- no number
    count = redis.call('HINCRBY', key, tenant, by)
  end
  if count <= 0 then redis.call('HDEL', key, tenant) end
end

-- A job that ends while it is queued leaves its message in the list until that is popped, which may be after its record
-- has expired.  Its id is kept until then, so that it is told from a job whose record was lost.
local function leave_message(model, id, tenant)
  count_queued(model, '!dead', 1)
  count_queued(model, '!dead:' .. tenant, 1)
  redis.call('HSET', own .. 'depth:' .. model, '!:' .. id, tenant)
end

local function has_left_message(model, id)
  return insist('HEXISTS', own .. 'depth:' .. model, '!:' .. id) == 1
end

local function drop_message(model, id)
  local key = own .. 'depth:' .. model
  local tenant = insist('HGET', key, '!:' .. id)
  if not tenant then return end
  redis.call('HDEL', key, '!:' .. id)
  count_queued(model, '!dead', -1)
  count_queued(model, '!dead:' .. tenant, -1)
end

-- No message is left.
local function forget_left(model)
  local key = own .. 'depth:' .. model
  for _, field in ipairs(insist('HKEYS', key)) do
    if field:sub(1, 1) == '!' then redis.call('HDEL', key, field) end
  end
end

-- The id in a message as kombu and we write it: with the body first, in base64.  Others wait for the claim that reads them.
local function id_of(raw) return raw:match('^{"body": "[%w+/=]*", .-"headers": {.-"id": "([%w._:-]+)"') end

-- Takes messages of ended jobs out of the lists: of those that are served next, and past a few that are not such.
local LOOKED_AT, LOOKED_PAST, LOOKED_BYTES = 1000, 32, 4194304
local function drop_dead(model)
  if whole(peek('HGET', own .. 'depth:' .. model, '!dead')) <= 0 then return end
  local looked, bytes = 0, 0
  for _, step in ipairs(STEPS) do
    local key, past = queue(model, step), 0
    while looked < LOOKED_AT and bytes < LOOKED_BYTES and past <= LOOKED_PAST do
      local raw = peek('LINDEX', key, -1 - past)
      if not raw then break end
      looked, bytes = looked + 1, bytes + #raw
      local id = id_of(raw)
      local job = id and read(id)
      if id and has_left_message(model, id) and (not job or is_terminal(job.state)) then
        if past == 0 then redis.call('RPOP', key) else redis.call('LREM', key, -1, raw) end
        drop_message(model, id)
      else
        past = past + 1
      end
    end
  end
  for _, step in ipairs(STEPS) do
    if peek('LLEN', queue(model, step)) ~= 0 then return end
  end
  forget_left(model)
end

local function letter_fields(entry)
  local f = {}
  for i = 1, #entry[2], 2 do f[entry[2][i]] = entry[2][i + 1] end
  f.head = f.head or f.message or '' -- earlier versions kept the message itself in the stream
  f.size = f.size or tostring(#f.head)
  f.kept = f.kept or f.size
  return f
end

local function count_bytes(by)
  local key = own .. 'letters_bytes'
  local bytes = redis.pcall('INCRBY', key, by)
  if not is_error(bytes) then return bytes end
  redis.call('DEL', key)
  return redis.call('INCRBY', key, by)
end

-- Says how many bytes the others keep.
local function drop_letter(letter, f)
  redis.call('XDEL', own .. 'letters', letter)
  redis.call('DEL', own .. 'letter:' .. letter)
  return count_bytes(0 - whole(f.kept)) -- a bare minus makes "-0" of none
end

local function letter_message(letter, f) return redis.call('GET', own .. 'letter:' .. letter) or f.head end

-- The stream holds no more than each message's head, so that looking through it is cheap.
local function bury(model, id, tenant, step, reason, message)
  local kept = message
  if #message > MAX_MESSAGE_BYTES and #message > LETTER_CUT_BYTES then
    kept = message:sub(1, LETTER_CUT_BYTES)
    reason = reason .. '; only its first ' .. LETTER_CUT_BYTES .. ' bytes are kept'
  end
  local letter = insist('XADD', own .. 'letters', '*', 'model', model, 'job', id, 'tenant', tenant, 'step', step,
    'reason', reason, 'head', kept:sub(1, LETTER_HEAD_BYTES), 'kept', #kept, 'size', #message, 'at', now)
  if #kept > LETTER_HEAD_BYTES then redis.call('SET', own .. 'letter:' .. letter, kept) end
  local num_letters, bytes = redis.call('XLEN', own .. 'letters'), count_bytes(#kept)
  if num_letters == 1 then redis.call('SET', own .. 'letters_bytes', #kept) end -- somebody emptied the stream by hand
  while num_letters > 1 and (num_letters > MAX_LETTERS or bytes > MAX_LETTERS_BYTES) do
    local oldest = redis.call('XRANGE', own .. 'letters', '-', '+', 'COUNT', 1)[1]
    bytes = drop_letter(oldest[1], letter_fields(oldest))
    num_letters = num_letters - 1
  end
  return letter
end

-- Celery's own JSON; cjson is used for free text only, so that empty lists stay lists.
local function celery_result(id, state, code, text, result)
  local status, value = 'SUCCESS', result
  if state == 'failed' then
    status = 'FAILURE'
    value = '{"exc_type": "JobFailed", "exc_message": [' .. cjson.encode(code .. ': ' .. text)
      .. '], "exc_module": "hortator.producer.errors"}'
  elseif state ~= 'succeeded' then
    status = 'REVOKED'
    value = '{"exc_type": "TaskRevokedError", "exc_message": [' .. cjson.encode(text)
      .. '], "exc_module": "celery.exceptions"}'
  end
  return '{"status": "' .. status .. '", "result": ' .. value .. ', "traceback": null, "children": [], "date_done": "'
    .. DATE_DONE .. '", "task_id": "' .. id .. '"}'
end

-- An id that is used again, after its record has expired, begins with nothing of its earlier life.
local function forget(id)
  redis.call('DEL', own .. 'journal:' .. id, namespace .. 'celery-task-meta-' .. id)
  insist('HLEN', own .. 'job:' .. id)
end

-- The last entry of the journal.  One that does not belong to this job (its ids are beyond ours) makes room.
local function close_journal(id, tokens, state)
  local key = own .. 'journal:' .. id
  local added = redis.pcall('XADD', key, tokens .. '-1', 'state', state)
  if type(added) == 'table' and added.err then
    redis.call('DEL', key)
    redis.call('XADD', key, tokens .. '-1', 'state', state)
  end
  redis.call('PEXPIRE', key, JOURNAL_TTL_MS)
end

-- Write a terminal state, once: callers have checked that `job.state` is not terminal.  What could fail comes first.
local function finish(id, job, state, code, text, result, seal)
  local announced = namespace .. 'celery-task-meta-' .. id
  local meta = celery_result(id, state, code, text, result)
  redis.call('DEL', own .. 'message:' .. id)
  if job.state == 'running' then
    insist('ZREM', own .. 'leases:' .. job.model, id)
  elseif job.state == 'queued' then
    count_queued(job.model, job.tenant, -1)
    if insist('LREM', own .. 'suspects:' .. job.model, 1, id) == 0 then
      leave_message(job.model, id, job.tenant)
    end
  end
  if job.deadline then insist('ZREM', own .. 'deadlines', id) end
  close_journal(id, job.tokens, state)
  redis.call('SET', announced, meta, 'PX', RESULT_TTL_MS)
  local key = own .. 'job:' .. id
  redis.call('HDEL', key, 'owner', 'alone', 'cancel', 'step', 'suspicion', 'rows')
  if state == 'succeeded' then
    redis.call('HSET', key, 'state', state, 'finished', now, 'seal', seal or '')
  else
    redis.call('HSET', key, 'state', state, 'finished', now, 'seal', seal or '', 'code', code, 'error', text)
  end
  redis.call('PEXPIRE', key, RESULT_TTL_MS)
  redis.call('PUBLISH', announced, meta)
  job.state = state
end

-- What the job needs is gone, so it can never run; `what` says which part of it.
function damaged(id, job, what)
  finish(id, job, 'failed', 'damaged', what .. ' in Redis is gone or was damaged; send the job anew')
end

local function cancelled(id, job) finish(id, job, 'cancelled', 'cancelled', 'the job was cancelled') end

local function expired(id, job)
  finish(id, job, 'expired', 'expired', 'its deadline passed while it was ' .. job.state)
end

-- Past its deadline and nobody is going to end it: queued, or running past the grace that its leader has.
local function overdue(job)
  if not job.deadline then return false end
  return (job.state == 'queued' and now >= job.deadline) or (job.state == 'running' and now >= job.deadline + GRACE_MS)
end

local function back_in_queue(id, job)
  redis.call('DEL', namespace .. 'celery-task-meta-' .. id) -- to Celery it is PENDING again
  insist('ZREM', own .. 'leases:' .. job.model, id)
  count_queued(job.model, job.tenant, 1)
  job.state = 'queued'
end

-- The group died while it ran the job: next time alone, and if it was alone, never again.  Says what became of it.
local function crashed(id, job)
  even_when_full()
  if job.cancel then
    cancelled(id, job)
    return 'cancelled'
  end
  if job.alone or job.attempt - job.free >= MAX_ATTEMPTS then
    local code, text = 'too_many_attempts', 'gave up after ' .. (job.attempt - job.free) .. ' attempts'
    if job.alone then code, text = 'poison', 'its group died twice while it ran, the last time with nothing beside it' end
    bury(job.model, id, job.tenant, job.step, code, message_of(id) or '')
    finish(id, job, 'failed', code, text)
    return 'poison'
  end
  back_in_queue(id, job)
  redis.call('HSET', own .. 'job:' .. id, 'state', 'queued', 'suspicion', job.suspicion + 1)
  insist('LPUSH', own .. 'suspects:' .. job.model, id)
  return 'suspect'
end

-- Handed back unfinished and without blame: served next, attempt not charged.  A suspect stays one.
local function drained(id, job)
  even_when_full()
  if job.cancel then return cancelled(id, job) end
  local message = message_of(id)
  if not message then return damaged(id, job, 'its message') end
  back_in_queue(id, job)
  redis.call('HSET', own .. 'job:' .. id, 'state', 'queued', 'free', job.free + 1)
  -- Where the queue itself takes nothing, for it is of another type, it waits among the suspects.
  if job.alone or is_error(redis.pcall('RPUSH', queue(job.model, job.step), message)) then
    insist('RPUSH', own .. 'suspects:' .. job.model, id)
    return
  end
  redis.call('DEL', own .. 'message:' .. id)
end
