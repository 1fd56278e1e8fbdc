"""Pure decisions of one replica: which tokens, pages and adapters make the next step. Imports no torch, reads no clock."""
