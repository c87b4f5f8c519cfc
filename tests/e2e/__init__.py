"""The console in a real browser, against a real service: `make e2e`. No part of `make test`, which needs no browser."""
