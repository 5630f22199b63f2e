"""Checks what a compose parser does not: reads `docker-compose config` on stdin and the Dockerfile named as the argument.

Promise: every service has a health check, what is published is published on loopback only, the image's user is not root.
"""

import re
import sys

import yaml


def problems_of_service(name, service):
    if "test" not in service.get("healthcheck", {}):
        yield f"{name} has no health check"
    for port in service.get("ports", []):
        if not str(port).startswith("127.0.0.1:"):
            yield f"{name} publishes {port} beyond 127.0.0.1"


def problems_of_dockerfile(text):
    last_stage = re.split(r"(?m)^FROM ", text)[-1]
    users = re.findall(r"(?m)^USER (\S+)", last_stage)
    if not users or users[-1].split(":")[0] in ("0", "root"):
        yield "the Dockerfile does not end with a user other than root"


def main():
    services = yaml.safe_load(sys.stdin)["services"]
    found = [problem for name, service in services.items() for problem in problems_of_service(name, service)]
    with open(sys.argv[1]) as dockerfile:
        found += problems_of_dockerfile(dockerfile.read())
    sys.exit("\n".join(found) or None)


main()
