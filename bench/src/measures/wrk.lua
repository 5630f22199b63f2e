-- What our own generator asks, for wrk.

-- Unseeded, every run would ask the same of the same users, and a patch that was made before changes nothing.
math.randomseed(tonumber(os.getenv("BENCH_SEED")))

local method, users = os.getenv("BENCH_METHOD"), tonumber(os.getenv("BENCH_USERS"))
local headers = { ["authorization"] = "Bearer " .. os.getenv("BENCH_KEY") }
if method == "PATCH" then
  headers["content-type"] = "application/merge-patch+json"
end

function request()
  local path = string.format("/v1/users/00000000-0000-4000-8000-%012x", math.random(0, users - 1))
  local body
  if method == "PATCH" then
    body = string.format('{"profile":{"job_title":"Editor %05d%05d"}}', math.random(0, 99999), math.random(0, 99999))
  end
  return wrk.format(method, path, headers, body)
end
