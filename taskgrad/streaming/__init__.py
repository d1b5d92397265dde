"""`tg.imap` and `tg.starmap`: a function over a stream of items."""
