"""Pure decisions of one replica: which tokens, pages and adapters make the next step. No torch, no clock."""
