-- ready: would a submit be taken now?  It fails as any write does where this Redis takes none.
--
-- | key     | type | here                                  |
-- |---------|------|---------------------------------------|
-- | nothing | none | deleted, and never there: a test write |
--
-- args: headroom
even_when_full()
return no_room(tonumber(arg(1))) or {'ok'}
