-- hold: the right to a group's name, which one leader has at a time.
--
-- | key            | type   | here                                                        |
-- |----------------|--------|-------------------------------------------------------------|
-- | holder:{group} | string | "life renewals JSON"; taken, kept for a while more, let go   |
--
-- args: group life json ttl_ms replacing ('' or the life whose process is known to be dead) leave ('1': let it go)
-- reply: nothing if the name is ours or was let go, else renewals and JSON of who has it
even_when_full()
local key = own .. 'holder:' .. arg(1)
local life, renewals, json = (insist('GET', key) or ''):match('^(%S+) (%d+) (.*)$')
if arg(6) == '1' then
  if life == arg(2) then redis.call('DEL', key) end
  return {}
end
if life and life ~= arg(2) and life ~= arg(5) then return {tonumber(renewals), json} end
local count = life == arg(2) and tonumber(renewals) + 1 or 0
redis.call('SET', key, arg(2) .. ' ' .. count .. ' ' .. arg(3), 'PX', arg(4))
return {}
