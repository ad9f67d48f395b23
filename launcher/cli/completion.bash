# Asks the command itself, by Typer's protocol for fish: a candidate and its help on a line, for the line up to the cursor.
# readline takes what is before = and : for words of their own, and adds a space unless it is told not to.
_capstan() {
    local line="${COMP_LINE:0:COMP_POINT}" candidate help
    local word="${line##* }"
    local before="${word%"${word##*[=:]}"}"
    COMPREPLY=()
    while IFS=$'\t' read -r candidate help; do
        [[ $candidate ]] && COMPREPLY+=("${candidate#"$before"}")
    done < <(env _CAPSTAN_COMPLETE=complete_fish _TYPER_COMPLETE_FISH_ACTION=get-args _TYPER_COMPLETE_ARGS="$line" "$1" 2>/dev/null)
    if [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=.] ]]; then compopt -o nospace; fi
}
complete -o default -F _capstan capstan
