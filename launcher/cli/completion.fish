# Asks the command itself, by Typer's protocol for fish: a candidate and its help on a line, for the line up to the cursor.
complete --command capstan --no-files \
    --condition "env _CAPSTAN_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=is-args _TYPER_COMPLETE_ARGS=(commandline -cp) capstan" \
    --arguments "(env _CAPSTAN_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS=(commandline -cp) capstan)"
