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
  local v = peek('HMGET', own .. 'job:' .. id, 'state', 'enqueued') or {}
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
      local raw = peek('LINDEX', queue(model, step), -i)
      if not raw or look(raw:match('"id"%s*:%s*"([%w._:-]+)"')) then break end
    end
  end
  look(peek('LINDEX', own .. 'suspects:' .. model, -1))
  return found and math.max(0, now - found) or ''
end

local alive = {}
local groups = peek('HGETALL', own .. 'groups') or {}
for i = 1, #groups, 2 do
  local beaten, json = groups[i + 1]:match('^(%d+) (.*)$')
  if beaten and now - tonumber(beaten) <= tonumber(arg(1)) then alive[#alive + 1] = json end
end

local rows = {}
local models = peek('HKEYS', own .. 'models') or {}
table.sort(models)
for _, model in ipairs(models) do
  local suspects = peek('LLEN', own .. 'suspects:' .. model) or 0
  local depth = suspects - whole(peek('HGET', own .. 'depth:' .. model, '!dead'))
  for _, step in ipairs(STEPS) do depth = depth + (peek('LLEN', queue(model, step)) or 0) end
  local running = peek('ZCARD', own .. 'leases:' .. model) or 0
  rows[#rows + 1] = {model, math.max(0, depth), oldest(model), running, suspects}
end
return {alive, rows}
