-- sweep: take leases that ran out for crashes, end jobs past their deadline, forget models that nobody serves.
--
-- | key                                 | type | here                                   |
-- |-------------------------------------|------|----------------------------------------|
-- | models                              | hash | read: whose leases to look at; one that is empty and silent for as long as results live is dropped |
-- | {model}, {model}\6\22{step}, suspects:{model} | list | lengths                     |
-- | depth:{model}, pace:{model}, turn:{model} | hash, string | dropped with the model  |
-- | leases:{model}                      | zset | read: which ran out                    |
-- | deadlines                           | zset | read: which have passed                |
-- | groups                              | hash | groups silent for an hour are dropped; read: whose models to keep |
-- | all of record.lua's crashed, finish |      |                                        |
--
-- args: limit, expired_before ('' for now): leases that ended before it are dead; conviction_grace_ms
-- A leader that was only stopped for a while comes back and is fenced.  What it ran has lost a few steps then, and a
-- suspect that it ran alone would have lost everything: for that one it must have been silent for much longer.
-- reply: now, requeued ids, expired ids, poisoned ids
local limit = tonumber(arg(1))
local before = arg(2) == '' and now or math.min(now, tonumber(arg(2)))
local convict_before = before - tonumber(arg(3))
local requeued, ended, poisoned = {}, {}, {}
even_when_full()

for _, model in ipairs(redis.call('HKEYS', own .. 'models')) do
  local key = own .. 'leases:' .. model
  local ended_leases = redis.call('ZRANGEBYSCORE', key, '-inf', '(' .. before, 'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #ended_leases, 2 do
    local id = ended_leases[i]
    local job = read(id)
    if not job or job.state ~= 'running' then
      redis.call('ZREM', key, id)
    elseif overdue(job) then
      expired(id, job)
      ended[#ended + 1] = id
    elseif not job.alone or tonumber(ended_leases[i + 1]) < convict_before then
      local fate = crashed(id, job)
      if fate == 'suspect' then requeued[#requeued + 1] = id end
      if fate == 'poison' then poisoned[#poisoned + 1] = id end
    end
  end
end

for _, id in ipairs(redis.call('ZRANGEBYSCORE', own .. 'deadlines', '-inf', now, 'LIMIT', 0, limit)) do
  local job = read(id)
  if not job or is_terminal(job.state) then
    redis.call('ZREM', own .. 'deadlines', id)
  elseif overdue(job) then
    expired(id, job)
    ended[#ended + 1] = id
  end
end

local function is_empty(model)
  local waiting = redis.call('LLEN', own .. 'suspects:' .. model) + redis.call('ZCARD', own .. 'leases:' .. model)
  for _, step in ipairs(STEPS) do waiting = waiting + redis.call('LLEN', queue(model, step)) end
  return waiting == 0
end

local spoken = {} -- models whose groups beat, even if they were never ready
local groups = redis.call('HGETALL', own .. 'groups')
for i = 1, #groups, 2 do
  local beaten, json = groups[i + 1]:match('^(%d+) (.*)$')
  if not beaten or now - tonumber(beaten) > 3600000 then
    redis.call('HDEL', own .. 'groups', groups[i])
  elseif now - tonumber(beaten) <= RESULT_TTL_MS then
    local read, beat = pcall(cjson.decode, json)
    if read and type(beat) == 'table' and beat.model then spoken[beat.model] = true end
  end
end

local known = redis.call('HGETALL', own .. 'models')
for i = 1, #known, 2 do
  local model = known[i]
  if now - tonumber(known[i + 1]) > RESULT_TTL_MS and not spoken[model] and is_empty(model) then
    redis.call('HDEL', own .. 'models', model)
    redis.call('DEL', own .. 'depth:' .. model, own .. 'pace:' .. model, own .. 'turn:' .. model)
  end
end

return {now, requeued, ended, poisoned}
