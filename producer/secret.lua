-- secret: what signs this Redis's job ids; made once.
--
-- | key    | type   | here                |
-- |--------|--------|---------------------|
-- | secret | string | read, or set if new |
--
-- args: a new secret.  reply: the secret
even_when_full()
redis.call('SETNX', own .. 'secret', arg(1))
return redis.call('GET', own .. 'secret')
