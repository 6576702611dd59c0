-- clear: a suspect got past the point where its group died; a later crash finds it one of many again.
--
-- | key      | type | here                        |
-- |----------|------|-----------------------------|
-- | job:{id} | hash | fence read; `alone` dropped |
--
-- args: id attempt
even_when_full()
local key = own .. 'job:' .. arg(1)
local v = peek('HMGET', key, 'state', 'attempt') or {}
if v[1] == 'running' and v[2] == arg(2) then redis.call('HDEL', key, 'alone') end
return 1
