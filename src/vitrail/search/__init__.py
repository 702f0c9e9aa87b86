"""Architecture search: spaces of nets, and strategies that say which of them to try."""
