"""Which codec and settings each weight gets, with exact bytes."""
