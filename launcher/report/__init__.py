"""`capstan report`: one page that shows what a run did, made of its records alone."""
