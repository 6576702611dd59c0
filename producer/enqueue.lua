-- enqueue: accept all jobs of one call, or none.
--
-- | key                          | type   | here                                            |
-- |------------------------------|--------|-------------------------------------------------|
-- | {model}, {model}\6\22{step}  | list   | LPUSH of the Celery message; at a limit those of ended jobs leave |
-- | job:{id}                     | hash   | the new record                                  |
-- | journal:{id}, celery-task-meta-{id} | stream, string | dropped: of an earlier life of the id      |
-- | idempotency:{tenant}:{hash}  | string | read; "digest id" of a new job; one whose job is gone counts as none |
-- | deadlines                    | zset   | the job's deadline                              |
-- | depth:{model}                | hash   | read for the limits; one more for the tenant    |
-- | suspects:{model}             | list   | read for the limits                             |
-- | models                       | hash   | read: is the model known                        |
-- | pace:{model}                 | hash   | read: when to try again                         |
--
-- args: require_known max_per_model max_per_tenant headroom idempotency_ttl_ms, then for each job:
--       id model tenant step message deadline_s metadata idempotency_key digest rows   ('' where there is none)
-- Everything is checked before the first write of a job; replies name the first refused job by its index from 0.
local REQUIRE_KNOWN = arg(1) == '1'
local MAX_PER_MODEL, MAX_PER_TENANT, HEADROOM = tonumber(arg(2)), tonumber(arg(3)), tonumber(arg(4))
local IDEMPOTENCY_TTL_MS = arg(5)
local WIDTH = 10

-- Limits bound what Redis holds, so messages count whose job has ended meanwhile, and those of foreign clients.
local function depth_of(model)
  local depth = peek('LLEN', own .. 'suspects:' .. model) or 0
  for _, step in ipairs(STEPS) do depth = depth + redis.call('LLEN', queue(model, step)) end
  return depth
end

local function depth_of_tenant(model, tenant)
  local key = own .. 'depth:' .. model
  return whole(peek('HGET', key, tenant)) + whole(peek('HGET', key, '!dead:' .. tenant))
end

local function retry_after_ms(model, excess)
  local rate = whole(peek('HGET', own .. 'pace:' .. model, 'rate'))
  if rate <= 0 then return 5000 end
  return math.max(1000, math.min(60000, math.ceil(1000 * excess / rate)))
end

local full = no_room(HEADROOM)
if full then return full end

-- One job more, and if it seems to be too many, without the messages that nobody will read.
local function count(model, m, tenant)
  m.fresh = m.fresh + 1
  local t = m.tenants[tenant] or {depth = depth_of_tenant(model, tenant), fresh = 0}
  m.tenants[tenant] = t
  t.fresh = t.fresh + 1
  if not m.tidy and (m.depth + m.fresh > MAX_PER_MODEL or t.depth + t.fresh > MAX_PER_TENANT) then
    drop_dead(model)
    m.tidy, m.depth = true, depth_of(model)
    for name, one in pairs(m.tenants) do one.depth = depth_of_tenant(model, name) end
  end
  return m.depth + m.fresh - MAX_PER_MODEL, t.depth + t.fresh - MAX_PER_TENANT
end

local models, by_key, taken, duplicates, fresh = {}, {}, {}, {}, {}
for i = 0, (num_args - 5) / WIDTH - 1 do
  local at = 5 + i * WIDTH
  local id, model, tenant, key, digest = arg(at + 1), arg(at + 2), arg(at + 3), arg(at + 8), arg(at + 9)

  local m = models[model]
  if not m then
    local beaten = peek('HGET', own .. 'models', model)
    if REQUIRE_KNOWN and (not beaten or beaten == '0') then
      local known = peek('HGETALL', own .. 'models') or {}
      local reply = {'unknown_model', i}
      for n = 1, #known, 2 do if known[n + 1] ~= '0' then reply[#reply + 1] = known[n] end end
      return reply
    end
    m = {depth = depth_of(model), fresh = 0, tenants = {}, known = beaten}
    models[model] = m
  end

  local first = nil -- the id that this job already has
  if key ~= '' then
    local seen = by_key[key] or redis.call('GET', key)
    local old_digest, old_id = (seen or ''):match('^(%S+) (%S+)$')
    if old_id and not by_key[key] and redis.call('EXISTS', own .. 'job:' .. old_id) == 0 then old_id = nil end -- expired
    if old_id then
      if old_digest ~= digest then return {'conflict', i} end
      first = old_id
    end
  end
  if not first then
    local owner = taken[id] or redis.call('HGET', own .. 'job:' .. id, 'tenant')
    if owner and owner ~= tenant then return {'taken', i} end
    if owner then first = id end -- the same call again, its first reply was lost
  end

  if first then
    duplicates[#duplicates + 1] = i
    duplicates[#duplicates + 1] = first
  else
    local excess, excess_of_tenant = count(model, m, tenant)
    if excess > 0 then return {'full_model', i, MAX_PER_MODEL, retry_after_ms(model, excess)} end
    if excess_of_tenant > 0 then return {'full_tenant', i, MAX_PER_TENANT, retry_after_ms(model, excess_of_tenant)} end
    if key ~= '' then by_key[key] = digest .. ' ' .. id end
    taken[id] = tenant
    fresh[#fresh + 1] = at
  end
end

-- from here on only writes; if Redis is over maxmemory the first one is refused and nothing has been written
for _, at in ipairs(fresh) do
  local id, model, tenant, step = arg(at + 1), arg(at + 2), arg(at + 3), arg(at + 4)
  local message, deadline_s, metadata, key = arg(at + 5), arg(at + 6), arg(at + 7), arg(at + 8)
  local deadline = set_deadline(id, deadline_s == '' and DEFAULT_DEADLINE_MS or math.ceil(tonumber(deadline_s) * 1000))
  local record = {'state', 'queued', 'model', model, 'tenant', tenant, 'attempt', 0, 'enqueued', now, 'deadline', deadline}
  if arg(at + 10) ~= '1' then record[#record + 1], record[#record + 2] = 'rows', arg(at + 10) end
  if metadata ~= '' then record[#record + 1], record[#record + 2] = 'metadata', metadata end
  redis.call('HSET', own .. 'job:' .. id, unpack(record))
  forget(id)
  redis.call('LPUSH', queue(model, step), message)
  count_queued(model, tenant, 1)
  if key ~= '' then redis.call('SET', key, by_key[key], 'PX', IDEMPOTENCY_TTL_MS) end
  if not models[model].known then
    insist('HSETNX', own .. 'models', model, 0)
    models[model].known = '0'
  end
end
return {'ok', unpack(duplicates)}
