-- letter: one dead letter with all that was kept of its message.
--
-- | key             | type   | here |
-- |-----------------|--------|------|
-- | letters         | stream | read |
-- | letter:{letter} | string | read |
--
-- args: letter id.  reply: none, or one as in letters
local entry = redis.call('XRANGE', own .. 'letters', arg(1), arg(1))[1]
if not entry then return {} end
local f = letter_fields(entry)
return {{entry[1], f.model, f.job, f.reason, letter_message(entry[1], f), f.at, f.size}}
