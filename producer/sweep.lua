-- sweep: take leases that ran out for crashes, end jobs past their deadline, forget models that nobody serves, and take
-- messages of ended jobs out of the queues.
--
-- | key                                 | type | here                                   |
-- |-------------------------------------|------|----------------------------------------|
-- | models                              | hash | read: whose leases to look at; one that is empty and silent for as long as results live is dropped |
-- | {model}, {model}\6\22{step}          | list | lengths; the oldest messages, if some are of ended jobs |
-- | suspects:{model}                    | list | length                                 |
-- | depth:{model}                       | hash | kept in step; dropped with the model   |
-- | pace:{model}, turn:{model}          | hash, string | dropped with the model         |
-- | leases:{model}                      | zset | read: which ran out                    |
-- | deadlines                           | zset | read: which have passed                |
-- | rooms:{model}                       | hash | what silent groups said is dropped     |
-- | groups                              | hash | groups silent for an hour are dropped; read: whose models to keep |
-- | all of record.lua's crashed, finish |      |                                        |
--
-- args: limit, expired_before ('' for now): leases that ended before it are dead; conviction_grace_ms
-- A leader that was only stopped for a while comes back and is fenced.  What it ran has lost a few steps then, and a
-- suspect that it ran alone would have lost everything: for that one it must have been silent for much longer.
-- reply: now, requeued ids, expired ids, poisoned ids, 'key: what was wrong with it' of what was passed by
local limit = tonumber(arg(1))
local before = arg(2) == '' and now or math.min(now, tonumber(arg(2)))
local ROOMS_KEPT_MS = 10000
local convict_before = before - tonumber(arg(3))
local requeued, ended, poisoned = {}, {}, {}
even_when_full()

-- One that raises is dropped from the list that led to it, and all others are swept.
local function each(key, ids, one)
  for i = 1, #ids, 2 do
    local ok, problem = pcall(one, ids[i], tonumber(ids[i + 1]))
    if not ok then
      note(own .. 'job:' .. ids[i], type(problem) == 'table' and problem.err or problem)
      redis.call('ZREM', key, ids[i])
    end
  end
end

local function ended_lease(key, id, ends)
  local job = read(id)
  if not job or job.state ~= 'running' then
    redis.call('ZREM', key, id)
  elseif overdue(job) then
    expired(id, job)
    ended[#ended + 1] = id
  elseif not job.alone or ends < convict_before then
    local fate = crashed(id, job)
    if fate == 'suspect' then requeued[#requeued + 1] = id end
    if fate == 'poison' then poisoned[#poisoned + 1] = id end
  end
end

-- Half a record: nobody can run it any more, but whoever waits for it is answered.
local function end_half(id)
  local state = peek('HGET', own .. 'job:' .. id, 'state')
  if not state or is_terminal(state) then return end
  note(own .. 'job:' .. id, 'no model')
  damaged(id, {state = 'new', tokens = 0}, 'its record')
end

local function passed_deadline(id, deadline)
  local job = read(id)
  if job then job.deadline = job.deadline or deadline end
  if not job or is_terminal(job.state) then
    redis.call('ZREM', own .. 'deadlines', id)
    if not job then end_half(id) end
  elseif overdue(job) then
    expired(id, job)
    ended[#ended + 1] = id
  end
end

for _, model in ipairs(insist('HKEYS', own .. 'models')) do
  local key = own .. 'leases:' .. model
  local late = insist('ZRANGEBYSCORE', key, '-inf', '(' .. before, 'WITHSCORES', 'LIMIT', 0, limit)
  each(key, late, function(id, ends) ended_lease(key, id, ends) end)
end

local deadlines = own .. 'deadlines'
each(deadlines, insist('ZRANGEBYSCORE', deadlines, '-inf', now, 'WITHSCORES', 'LIMIT', 0, limit), passed_deadline)

-- Of a group that was killed nothing stays where others go on beating; claims have not counted it for long.
local function forget_rooms(model)
  local said = insist('HGETALL', own .. 'rooms:' .. model)
  for i = 1, #said, 2 do
    if now - whole(said[i + 1]:match('^%d+')) > ROOMS_KEPT_MS then redis.call('HDEL', own .. 'rooms:' .. model, said[i]) end
  end
end

for _, model in ipairs(redis.call('HKEYS', own .. 'models')) do
  drop_dead(model)
  forget_rooms(model)
end

-- A key of another type under a queue's name may be somebody's: nothing is dropped then.
local function is_empty(model)
  local waiting = insist('LLEN', own .. 'suspects:' .. model) + insist('ZCARD', own .. 'leases:' .. model)
  for _, step in ipairs(STEPS) do waiting = waiting + (peek('LLEN', queue(model, step)) or 1) end
  return waiting == 0
end

local spoken = {} -- models whose groups beat, even if they were never ready
local groups = insist('HGETALL', own .. 'groups')
for i = 1, #groups, 2 do
  local beaten, json = groups[i + 1]:match('^(%d+) (.*)$')
  if not beaten or now - tonumber(beaten) > 3600000 then
    redis.call('HDEL', own .. 'groups', groups[i])
  elseif now - tonumber(beaten) <= RESULT_TTL_MS then
    local read, beat = pcall(cjson.decode, json)
    if read and type(beat) == 'table' and type(beat.model) == 'string' then spoken[beat.model] = true end
  end
end

local known = redis.call('HGETALL', own .. 'models')
for i = 1, #known, 2 do
  local model = known[i]
  if now - whole(known[i + 1]) > RESULT_TTL_MS and not spoken[model] and is_empty(model) then
    redis.call('HDEL', own .. 'models', model)
    redis.call('DEL', own .. 'depth:' .. model, own .. 'pace:' .. model, own .. 'turn:' .. model)
  end
end

return {now, requeued, ended, poisoned, met}
