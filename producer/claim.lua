-- claim: take jobs off one model's queue; pop and lease are one call, so a dead claimer never takes a job with it.
--
-- | key                          | type   | here                                                     |
-- |------------------------------|--------|----------------------------------------------------------|
-- | {model}, {model}\6\22{step}  | list   | RPOP; LPUSH of messages for newer workers                |
-- | suspects:{model}             | list   | RPOP of one, for an idle group                           |
-- | alone:{model}                | string | who makes room for suspects, or deals with the last few  |
-- | turn:{model}                 | string | the round of priority classes goes on where it stood     |
-- | job:{id}                     | hash   | becomes running; made for foreign messages               |
-- | message:{id}                 | string | the message while it is in no list                       |
-- | journal:{id}                 | stream | read: tokens of earlier attempts; dropped with a new record |
-- | leases:{model}               | zset   | the new leases                                           |
-- | depth:{model}                | hash   | one less for the tenant                                  |
-- | deadlines                    | zset   | the default one of a foreign message                     |
-- | claimed:{owner}              | string | this reply's leases, until the next call proves it seen  |
-- | pace:{model}                 | hash   | claims per second                                        |
-- | rooms:{model}                | hash   | read: who else has rows; what this group has left        |
-- | models                       | hash   | so that the sweeper finds the leases                     |
-- | letters                      | stream | messages that can never run                              |
-- | celery-task-meta-{id}        | string | STARTED; the failure of a refused foreign message with an id |
--
-- args: model owner token seen limit lease_ms idle version surplus room_counts_ms claim_jobs claim_bytes
-- `token` names this reply; `seen` is the token of the last reply that arrived: if it is not the last one that was sent,
-- that one was lost on the way and is sent again.
-- reply: mode, full_run_alone, more, now, token, then each job as {id attempt message tenant enqueued deadline journal}
local model, owner, token, seen = arg(1), arg(2), arg(3), arg(4)
local limit, lease_ms, idle = tonumber(arg(5)), tonumber(arg(6)), arg(7) == '1'
local version, surplus, ROOM_COUNTS_MS = tonumber(arg(8)), tonumber(arg(9)), tonumber(arg(10))
local CLAIM_JOBS, CLAIM_BYTES = tonumber(arg(11)), tonumber(arg(12))
local ROUND = {1, 2, 1, 3, 1, 2, 1, 4, 1, 2, 1, 3, 1, 2, 1} -- eight, four, two and one turn for the four steps
local MAX_ESCAPES = 100000
local FEW = 8 -- suspects that the group which tries them gets through in a second or two, without another one's help
local REMEMBER_MS = 15000 -- a reply that was lost in an outage is told again after it
local MAX_REFUSED = 256 -- bad, dead or duplicate messages thrown out in one call

even_when_full()
local leases, claimed_key = own .. 'leases:' .. model, own .. 'claimed:' .. owner
local suspects, alone_key = own .. 'suspects:' .. model, own .. 'alone:' .. model
local jobs, leased, rows, bytes = {}, {}, 0, 0
local group = owner:gsub('#%x+$', '')
-- What a plain Celery client sees of a running job.  No PUBLISH: whoever waits, waits for the end.
local started = '{"status": "STARTED", "result": {"hostname": ' .. cjson.encode(group)
  .. '}, "traceback": null, "children": [], "date_done": null, "task_id": "'

-- As journal.py writes it: index, token ids, text, logprobs and more.
local function is_chunk(value)
  return type(value) == 'table' and type(value[2]) == 'table' and type(value[3]) == 'string' and value[4] ~= nil
end

-- The tokens of earlier attempts, an entry each chunk; nil if they are not all there, one after the other.
local function journal_of(id, tokens)
  local chunks, after = {}, 0
  if tokens == 0 then return chunks end
  for _, entry in ipairs(peek('XRANGE', own .. 'journal:' .. id, '-', '+') or {}) do
    if entry[2][1] == 'c' then
      local ok, chunk = pcall(cjson.decode, entry[2][2])
      if not ok or not is_chunk(chunk) or chunk[1] ~= after then return nil end
      after = after + #chunk[2]
      if entry[1] ~= after .. '-0' then return nil end
      chunks[#chunks + 1] = entry[2][2]
    end
  end
  return after == tokens and chunks or nil
end

-- What else the job needs, nil if it is not there, and then its job has ended.
local function needs(id, job, message)
  local journal = journal_of(id, job.tokens)
  if message and journal then return journal end
  damaged(id, job, message and 'its journal' or 'its message')
  return nil
end

local function tell(id, attempt, message, job, journal)
  jobs[#jobs + 1] = {id, attempt, message, job.tenant, job.enqueued, job.deadline or '', journal}
  bytes = bytes + #message
  for _, chunk in ipairs(journal) do bytes = bytes + #chunk end
end

local function is_cut() return #jobs >= CLAIM_JOBS or bytes >= CLAIM_BYTES end

local function reply(mode, full, name)
  return {mode, full and 1 or 0, is_cut() and 1 or 0, now, name, unpack(jobs)}
end

local function lost_reply()
  local sent = insist('GET', claimed_key)
  if not sent then return nil end
  local name, mode, full, rest = sent:match('^(%S+) (%S+) (%S+) (.*)$')
  if not name or name == seen then return nil end -- nothing that we wrote, or no reply was lost
  for id, attempt in rest:gmatch('(%S+) (%d+)') do
    local job = read(id)
    if job and job.state == 'running' and job.attempt == tonumber(attempt) then
      local message = message_of(id)
      local journal = needs(id, job, message)
      if journal then
        insist('ZADD', leases, now + lease_ms, id)
        tell(id, job.attempt, message, job, journal)
      end
    end
  end
  return #jobs > 0 and reply(mode, full == '1', name) or nil
end

local function lease(id, job, message, journal, step, alone)
  local key, attempt = own .. 'job:' .. id, job.attempt + 1
  redis.call('HSET', key, 'state', 'running', 'attempt', attempt, 'owner', owner, 'step', step, 'alone', alone and 1 or 0)
  redis.call('HSETNX', key, 'claimed', now)
  redis.call('SET', namespace .. 'celery-task-meta-' .. id, started .. id .. '"}')
  insist('ZADD', leases, now + lease_ms, id)
  leased[#leased + 1] = id .. ' ' .. attempt
  rows = rows + job.rows
  tell(id, attempt, message, job, journal)
end

local function remember(mode, full)
  if #leased == 0 then return end
  redis.call('SET', claimed_key, token .. ' ' .. mode .. ' ' .. (full and 1 or 0) .. ' ' .. table.concat(leased, ' '),
    'PX', math.max(lease_ms, REMEMBER_MS))
  insist('HSETNX', own .. 'models', model, 0)
  local pace_key = own .. 'pace:' .. model
  local pace = insist('HMGET', pace_key, 'since', 'count')
  local since, count = whole(pace[1] or now), whole(pace[2]) + #leased
  if now - since >= 5000 then
    redis.call('HSET', pace_key, 'since', now, 'count', 0, 'rate', string.format('%.3f', 1000 * count / (now - since)))
  else
    redis.call('HSET', pace_key, 'since', since, 'count', count)
  end
end

local function tried_alone(id, job, message, journal)
  local num_left = redis.call('LLEN', suspects)
  if num_left > 0 and num_left <= FEW then
    redis.call('SET', alone_key, owner, 'PX', lease_ms)
  elseif insist('GET', alone_key) == owner then
    redis.call('DEL', alone_key)
  end
  count_queued(model, job.tenant, -1)
  local full = job.suspicion >= 2
  lease(id, job, message, journal, job.step, true)
  remember('alone', full)
  return reply('alone', full, token)
end

-- One suspect for a group that runs nothing.  A busy group, one at a time, is asked to make room, unless the one that
-- tries suspects will soon have no more of them.
local function suspect_first()
  while insist('LLEN', suspects) > 0 do
    if not idle then
      local holder = insist('GET', alone_key)
      if holder and holder ~= owner then return nil end
      redis.call('SET', alone_key, owner, 'PX', lease_ms)
      return reply('drain', false, token)
    end
    local id = redis.call('LINDEX', suspects, -1)
    local job = read(id)
    if not job or job.state ~= 'queued' then
      redis.call('LREM', suspects, -1, id)
    else -- one that ends here leaves as any other does
      if overdue(job) then
        expired(id, job)
      else
        local message = message_of(id)
        local journal = needs(id, job, message)
        if journal then
          redis.call('RPOP', suspects)
          return tried_alone(id, job, message, journal)
        end
      end
    end
  end
  return nil
end

local function is_object(value) return type(value) == 'table' and value[1] == nil end

-- The message without what stands between the quotes of its body, so that only the envelope is decoded.
local function without_body(raw)
  local _, start = raw:sub(1, ENVELOPE_BYTES):find('"body"%s*:%s*"')
  if not start then return raw end
  local stop = start
  for _ = 1, MAX_ESCAPES do -- none in base64, but others may send a body as it is
    stop = raw:find('"', stop + 1, true)
    if not stop then return raw end
    local backslashes = 0
    while raw:byte(stop - 1 - backslashes) == 92 do backslashes = backslashes + 1 end
    if backslashes % 2 == 0 then return raw:sub(1, start) .. raw:sub(stop) end
  end
  return raw
end

-- What the envelope says: the job's id if it has a sound one, what is wrong, the schema's version, whether a record
-- was written with it.
local function look(raw)
  local json = without_body(raw)
  if #json > ENVELOPE_BYTES then return nil, 'its envelope is larger than ' .. ENVELOPE_BYTES .. ' bytes' end
  local ok, m = pcall(cjson.decode, json)
  local no_text = not ok and json:find('\\u[dD][89a-fA-F]')
  if no_text then -- its job is told of it, if that is all that is wrong
    ok, m = pcall(cjson.decode, (json:gsub('\\u[dD][89a-fA-F]%x%x', '\\ufffd')))
  end
  if not ok or not is_object(m) or raw:match('^%s*(.)') ~= '{' then return nil, 'not a JSON object' end
  local headers = m['headers']
  if not is_object(headers) then return nil, 'no headers: not a Celery protocol 2 message' end
  local id = headers['id']
  if type(id) ~= 'string' or #id > 128 or not id:match('^[A-Za-z0-9][A-Za-z0-9._:-]*$') then
    return nil, 'no usable id in its headers'
  end
  if no_text then return id, 'its envelope has half of a surrogate pair, which is no text' end
  if m['content-type'] ~= 'application/json' then return id, 'its content type is not application/json' end
  if type(m['body']) ~= 'string' then return id, 'no body' end
  if not is_object(m['properties']) then return id, 'no properties: not a Celery protocol 2 message' end
  local mark = headers['hortator']
  if type(mark) ~= 'table' then return id, nil, nil, false end
  local spoken = mark['version']
  if spoken == cjson.null then spoken = nil end
  if spoken ~= nil and (type(spoken) ~= 'number' or spoken < 1 or spoken % 1 ~= 0) then
    return id, 'its hortator.version is no version: a positive integer'
  end
  return id, nil, spoken, mark['record'] == true
end

-- A message that is too large has an id too: its job must end now, not at its deadline.
local function open(raw)
  local id, problem, spoken, recorded = look(raw)
  if #raw > MAX_MESSAGE_BYTES then problem = 'too large: ' .. #raw .. ' bytes, the limit is ' .. MAX_MESSAGE_BYTES end
  return id, problem, spoken, recorded
end

local function refuse(id, problem, raw, step)
  local job = id and read(id)
  bury(model, id or '', job and job.tenant or 'default', step, problem, raw)
  if id and not job then
    forget(id)
    redis.call('HSET', own .. 'job:' .. id, 'model', model, 'tenant', 'default', 'attempt', 0, 'enqueued', now)
    finish(id, {state = 'new', model = model, tenant = 'default', tokens = 0}, 'failed', 'malformed', problem)
  elseif job and job.state == 'queued' then -- a replayed letter that is still bad
    finish(id, job, 'failed', 'malformed', problem)
    drop_message(job.model, id)
  end
end

-- True when the message became a leased job.
local function take(raw, step)
  local id, problem, spoken, recorded = open(raw)
  if problem then
    refuse(id, problem, raw, step)
    return false
  end
  if spoken and spoken ~= version then
    redis.call('LPUSH', queue(model, step), raw) -- last in line, for a worker that speaks it
    return false
  end
  local job = read(id)
  if not job and has_left_message(model, id) then
    drop_message(model, id)
    return false
  end
  if not job and recorded then
    bury(model, id, 'default', step, 'its record is gone: expired, or a late duplicate', raw)
    return false
  end
  if not job then
    job = {state = 'queued', model = model, tenant = 'default', attempt = 0, tokens = 0, suspicion = 0, enqueued = now,
      deadline = set_deadline(id, DEFAULT_DEADLINE_MS), rows = rows_of(raw)}
    forget(id)
    redis.call('HSET', own .. 'job:' .. id, 'state', 'queued', 'model', model, 'tenant', 'default', 'attempt', 0,
      'enqueued', now, 'deadline', job.deadline, 'rows', job.rows)
    count_queued(model, 'default', 1) -- for a moment
  elseif is_terminal(job.state) then
    drop_message(model, id)
    return false
  elseif job.state == 'running' or job.model ~= model
    or (job.suspicion > 0 and redis.call('EXISTS', own .. 'message:' .. id) == 1) then
    return false -- a duplicate: the job runs, or waits elsewhere
  elseif overdue(job) then
    expired(id, job)
    drop_message(model, id)
    return false
  end
  local journal = needs(id, job, raw)
  if not journal then
    drop_message(model, id)
    return false
  end
  count_queued(model, job.tenant, -1)
  redis.call('SET', own .. 'message:' .. id, raw)
  lease(id, job, raw, journal, step, false)
  return true
end

-- What was popped is in no list any more: whatever stops its way to a lease, it is kept, and those behind it go on.
local function take_or_bury(raw, step)
  local ok, problem = pcall(take, raw, step)
  if ok then return end
  local id = look(raw)
  note(own .. 'job:' .. (id or ''), type(problem) == 'table' and problem.err or problem)
  bury(model, id or '', 'default', step, 'what Redis holds of its job is damaged', raw)
end

-- Of `total` jobs, how many rows this group may fill now: all that it has, if that leaves enough for the free rows of
-- the others, and else what it has of all that are free.
local function share(total)
  local free, others = limit - surplus, 0
  local said = insist('HGETALL', own .. 'rooms:' .. model)
  for i = 1, #said, 2 do
    local at, room = said[i + 1]:match('^(%d+) (%d+)$')
    if at and said[i] ~= group and now - whole(at) < ROOM_COUNTS_MS then others = others + whole(room) end
  end
  if others == 0 then return limit end
  if total >= free + others then return free + math.min(surplus, total - free - others) end
  return math.ceil(total * math.max(0, free) / (free + others))
end

local lost = lost_reply()
if lost then return lost end
local special = suspect_first()
if special then return special end
if insist('GET', alone_key) == owner then redis.call('DEL', alone_key) end

local left, total = {}, 0
for i, step in ipairs(STEPS) do
  left[i] = redis.call('LLEN', queue(model, step)) -- of another type it may be somebody's: the worker's log says so
  total = total + left[i]
end
if total == 0 then
  forget_left(model)
  if redis.call('LLEN', suspects) == 0 then redis.call('DEL', own .. 'depth:' .. model) end -- also jobs of a lost record
  return reply('together', false, token)
end

local most = share(total)
local mode = most < math.min(limit, total) and 'shared' or 'together'
local turn_key = own .. 'turn:' .. model
local turn, examined = math.max(0, whole(insist('GET', turn_key))), 0
local most_examined = math.min(limit, CLAIM_JOBS) + MAX_REFUSED
while total > 0 and rows < most and not is_cut() and examined < most_examined do
  local class = ROUND[turn % #ROUND + 1]
  turn = turn + 1
  if left[class] > 0 then
    left[class], total, examined = left[class] - 1, total - 1, examined + 1
    local raw = redis.call('RPOP', queue(model, STEPS[class]))
    if raw then take_or_bury(raw, STEPS[class]) end
  end
end
redis.call('SET', turn_key, turn % #ROUND)
local rooms = own .. 'rooms:' .. model
if rows > 0 and insist('HEXISTS', rooms, group) == 1 then
  redis.call('HSET', rooms, group, now .. ' ' .. math.max(0, limit - surplus - rows))
end
remember(mode, false)
return reply(mode, false, token)
