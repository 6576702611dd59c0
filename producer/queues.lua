-- queues: how every known model's queue stands.
--
-- | key                         | type | here                                       |
-- |-----------------------------|------|--------------------------------------------|
-- | models, groups              | hash | read                                       |
-- | {model}, {model}\6\22{step} | list | lengths; the oldest few messages           |
-- | suspects:{model}            | list | length                                     |
-- | depth:{model}               | hash | read: messages of ended jobs do not count  |
-- | leases:{model}              | zset | size                                       |
-- | job:{id}                    | hash | read: when the oldest was enqueued         |
--
-- args: beat_ttl_ms
-- reply: groups alive as JSON, then for each model: model depth oldest_age_ms ('' if empty) running suspects
local OLDEST_LOOKED_AT = 8

local function enqueued(id)
  local v = redis.call('HMGET', own .. 'job:' .. id, 'state', 'enqueued')
  return v[1] == 'queued' and tonumber(v[2]) or nil
end

local function oldest(model)
  local found = nil
  local function look(id)
    local at = id and enqueued(id)
    if at and (not found or at < found) then found = at end
    return at
  end
  for _, step in ipairs(STEPS) do
    for i = 1, OLDEST_LOOKED_AT do -- ended jobs may stand in front
      local raw = redis.call('LINDEX', queue(model, step), -i)
      if not raw or look(raw:match('"id"%s*:%s*"([%w._:-]+)"')) then break end
    end
  end
  look(redis.call('LINDEX', own .. 'suspects:' .. model, -1))
  return found and math.max(0, now - found) or ''
end

local alive = {}
local groups = redis.call('HGETALL', own .. 'groups')
for i = 1, #groups, 2 do
  local beaten, json = groups[i + 1]:match('^(%d+) (.*)$')
  if beaten and now - tonumber(beaten) <= tonumber(arg(1)) then alive[#alive + 1] = json end
end

local rows = {}
local models = redis.call('HKEYS', own .. 'models')
table.sort(models)
for _, model in ipairs(models) do
  local suspects = redis.call('LLEN', own .. 'suspects:' .. model)
  local depth = suspects - tonumber(redis.call('HGET', own .. 'depth:' .. model, '!dead') or 0)
  for _, step in ipairs(STEPS) do depth = depth + redis.call('LLEN', queue(model, step)) end
  rows[#rows + 1] = {model, math.max(0, depth), oldest(model), redis.call('ZCARD', own .. 'leases:' .. model), suspects}
end
return {alive, rows}
