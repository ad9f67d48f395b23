#compdef capstan
# Asks the command itself, by Typer's protocol for fish: a candidate and its help on a line, for the line up to the cursor.
_capstan() {
    local line
    local -a open closed
    for line in "${(@f)$(env _CAPSTAN_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS="${words[1,$CURRENT]}" $words[1] 2>/dev/null)}"; do
        line=${line%%$'\t'*}
        case $line in ('') ;; (*[=.]) open+=($line) ;; (*) closed+=($line) ;; esac
    done
    (( $#open )) && compadd -S '' -- $open
    (( $#closed )) && compadd -- $closed
    (( $#open + $#closed )) || _files
}
compdef _capstan capstan
