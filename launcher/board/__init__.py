"""`capstan board`: runs on a page in the browser, which grows while they train, with buttons that run the commands."""
