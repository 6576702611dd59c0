-- beat: a group says that it is alive.
--
-- | key    | type | here                            |
-- |--------|------|---------------------------------|
-- | groups | hash | group -> "ms JSON"              |
-- | models | hash | makes the model known           |
--
-- args: group model json down ('1': the group takes its leave)
even_when_full()
redis.call('HSET', own .. 'models', arg(2), now)
if arg(4) == '1' then
  redis.call('HDEL', own .. 'groups', arg(1))
else
  redis.call('HSET', own .. 'groups', arg(1), now .. ' ' .. arg(3))
end
return now
