# What the launchers share; sourced.
# shellcheck shell=bash disable=SC2034

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here") # of the checkout
script=launch/$(basename "$0")
dry_run=
main_flags=() # of fliqs_jax.main

# The comment at the top of the script is its help.
help() { sed -n '2,/^[^#]/{s/^# \{0,1\}//p;}' "$0"; }

say() { echo "$script: $*" >&2; }

# Wrong input: one line, status 2, before anything is created.
reject() {
  say "$*; see $script --help"
  exit 2
}

# Prints words such that a shell reads them as the same words.
quoted() {
  local words
  printf -v words '%q ' "$@"
  printf '%s' "${words% }"
}

# Runs a command, or prints it with --dry_run.
perform() { if [[ $dry_run ]]; then quoted "$@" && echo; else "$@"; fi; }

# parse "VALUES" "SWITCHES" ARGUMENT... sets the variables that the flags name; what
# follows `--` becomes main_flags.
parse() {
  local values=" $1 " switches=" $2 dry_run " flag
  shift 2
  while (($#)); do
    flag=${1%%=*}
    flag=${flag#--}
    case $1 in
      --) shift && main_flags=("$@") && return ;;
      --*=*)
        [[ $values == *" $flag "* ]] || reject "unknown flag --$flag=…"
        printf -v "$flag" %s "${1#*=}"
        ;;
      --*)
        [[ $values != *" $flag "* ]] || reject "--$flag needs a value: --$flag=…"
        [[ $switches == *" $flag "* ]] || reject "unknown flag $1"
        printf -v "$flag" 1
        ;;
      *) reject "unexpected argument '$1': the flags of main come after --" ;;
    esac
    shift
  done
}

# Rejects flags that were not given.
require() {
  local flag
  for flag in "$@"; do
    [[ ${!flag} ]] || reject "--$flag=… is missing"
  done
}

# Names of cloud resources: the tightest of the rules that apply.
check_name() {
  [[ $1 =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    reject "--name='$1' is no name: expected up to 40 lower-case letters, digits and -"
}

check_count() {
  [[ $2 =~ ^[0-9]+$ ]] || reject "--$1='$2' is no count"
}

# Prints the value of one of main's flags.
main_flag() {
  local flag
  for flag in "${main_flags[@]}"; do
    [[ $flag != "--$1="* ]] || echo "${flag#*=}"
  done
}

# Rejects flags of main without a config or without a workdir in a bucket.
check_main_flags() {
  [[ $(main_flag config) ]] || reject 'main needs --config=…, after --'
  [[ $(main_flag workdir) == gs://?* ]] ||
    reject 'main needs --workdir=gs://BUCKET/FOLDER, which outlives the machines, after --'
}
