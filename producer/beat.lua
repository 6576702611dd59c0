-- beat: a group says that it is alive.
--
-- | key           | type | here                                                                     |
-- |---------------|------|--------------------------------------------------------------------------|
-- | groups        | hash | group -> "ms JSON"                                                       |
-- | models        | hash | a ready group makes its model known; any of its groups keeps it known    |
-- | rooms:{model} | hash | group -> "ms rows", of groups that have rows for jobs                    |
--
-- args: group model json state ('gone': the group takes its leave) room room_counts_ms
even_when_full()
local models = own .. 'models'
local served = (insist('HGET', models, arg(2)) or '0') ~= '0'
if arg(4) == 'ready' or served then
  redis.call('HSET', models, arg(2), now)
else
  redis.call('HSETNX', models, arg(2), 0) -- listed, with its groups, but it takes no jobs
end
local rooms = own .. 'rooms:' .. arg(2)
if tonumber(arg(5)) > 0 then
  insist('HSET', rooms, arg(1), now .. ' ' .. arg(5))
  redis.call('PEXPIRE', rooms, arg(6))
else
  insist('HDEL', rooms, arg(1))
end
if arg(4) == 'gone' then
  insist('HDEL', own .. 'groups', arg(1))
else
  insist('HSET', own .. 'groups', arg(1), now .. ' ' .. arg(3))
end
return now
