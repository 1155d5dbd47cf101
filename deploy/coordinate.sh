#!/bin/sh
# Start the run of a config, or continue it if it was started before. A service manager repeats the same command after a
# failure, and `fedamole server CONFIG` alone would then start a second run.
#
#     coordinate.sh CONFIG FOLDER [OPTIONS of `fedamole server`]
set -eu
config=$1 folder=$2
shift 2
if [ -e "$folder/server/config.toml" ]; then
  exec fedamole server --resume "$folder" "$@"
fi
exec fedamole server "$config" "run.folder=$folder" "$@"
