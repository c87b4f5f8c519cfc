"""The web console: plain ES modules, served by `service.routes.console` as they lie here."""
