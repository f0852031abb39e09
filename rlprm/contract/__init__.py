"""What every piece of a group must do, whoever wrote it: the tests of `conf/`, and of your own pieces by `rlprm check`."""
