-- count_letters: how many dead letters there are, of all models.
--
-- | key     | type   | here |
-- |---------|--------|------|
-- | letters | stream | size |
--
-- reply: the number
return redis.call('XLEN', own .. 'letters')
