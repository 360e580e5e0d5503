package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// outcome is what `go test -json` says at a test's end.
type outcome string

const (
	pass outcome = "pass"
	fail outcome = "fail"
	skip outcome = "skip"
)

// test is a group (a Test function) or, with slashes in its name, a subtest.
type test struct{ pkg, name string }

func (t test) group() test {
	name, _, _ := strings.Cut(t.name, "/")
	return test{t.pkg, name}
}

func (t test) isGroup() bool { return !strings.Contains(t.name, "/") }

func (t test) less(other test) bool {
	if t.pkg != other.pkg {
		return t.pkg < other.pkg
	}
	return t.name < other.name
}

// table holds how each test went: the file results.tsv, or one run.
type table map[test]outcome

// with gives this table with the groups of another run in place of its own.
func (t table) with(run table) table {
	merged := table{}
	for name, outcome := range t {
		if _, ran := run[name.group()]; !ran {
			merged[name] = outcome
		}
	}
	for name, outcome := range run {
		merged[name] = outcome
	}
	return merged
}

// counts tells how many groups and subtests passed, failed and were skipped, one line each.
func counts(t table) string {
	var groups, subtests = map[outcome]int{}, map[outcome]int{}
	for name, outcome := range t {
		if name.isGroup() {
			groups[outcome]++
		} else {
			subtests[outcome]++
		}
	}
	line := func(of map[outcome]int) string {
		return fmt.Sprintf("%d pass, %d fail, %d skip", of[pass], of[fail], of[skip])
	}
	return fmt.Sprintf("# groups: %s\n# subtests: %s\n", line(groups), line(subtests))
}

// write replaces the file: counts on top, then one line a test.
func (t table) write(path string) error {
	var names []test
	for name := range t {
		names = append(names, name)
	}
	var text strings.Builder
	text.WriteString(counts(t))
	for _, name := range sorted(names) {
		fmt.Fprintf(&text, "%s\t%s\t%s\n", t[name], shortName(name.pkg), name.name)
	}
	return os.WriteFile(path, []byte(text.String()), 0o644)
}

// readTable reads what write wrote; no file is an empty table.
func readTable(path string) (table, error) {
	text, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return table{}, nil
	} else if err != nil {
		return nil, err
	}
	t := table{}
	for number, line := range strings.Split(string(text), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.SplitN(line, "\t", 3)
		if len(fields) != 3 {
			return nil, fmt.Errorf("%s:%d: expected outcome, package and test, with tabs between them", path, number+1)
		}
		t[test{longName(fields[1]), fields[2]}] = outcome(fields[0])
	}
	return t, nil
}
