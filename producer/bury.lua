-- bury: put a message to the dead letters.
--
-- | key      | type   | here                                    |
-- |----------|--------|-----------------------------------------|
-- | all of record.lua's bury |  |                         |
-- | job:{id} | hash   | read: whose job it was, and its queue   |
--
-- args: model id reason message.  reply: the letter's id
even_when_full()
local job = arg(2) ~= '' and read(arg(2)) or {}
return bury(arg(1), arg(2), job.tenant or 'default', job.step or '0', arg(3), arg(4))
