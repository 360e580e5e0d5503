// Command results runs Complement's packages and our own through `go test -json`, prints how each group went, and compares
// with the committed baseline: it ends with 1 when something that passed there fails now. script/complement calls it.
package main

import (
	"flag"
	"fmt"
	"os"
	"regexp"
	"sort"
	"strings"
)

// More regressed groups than this are not run again: then the server is broken, not slow.
const rerunGroupsMax = 20

func main() {
	run := flag.String("run", "", "only the groups matching this regular expression")
	baselinePath := flag.String("baseline", "results.tsv", "the results to compare with")
	logs := flag.String("logs", "", "the directory for what failing groups printed")
	write := flag.Bool("write", false, "write the results into the baseline")
	flag.Parse()
	if err := compare(*run, *baselinePath, *logs, *write); err != nil {
		fmt.Fprintln(os.Stderr, "complement:", err)
		os.Exit(1)
	}
}

func compare(run, baselinePath, logs string, write bool) error {
	baseline, err := readTable(baselinePath)
	if err != nil {
		return err
	}
	results, err := runSuite(suite, run, logs)
	if err != nil {
		return err
	}
	if len(results) == 0 {
		return fmt.Errorf("no test ran")
	}
	worse := regressions(baseline, results, run)
	if groups := groupsOf(worse); len(groups) > 0 && len(groups) <= rerunGroupsMax {
		fmt.Printf("\n%d groups did worse than the baseline; each is run once more before that counts:\n", len(groups))
		if err := runAgain(groups, results, logs); err != nil {
			return err
		}
		worse = regressions(baseline, results, run)
	}

	fmt.Printf("\n%s", counts(results))
	report("pass now, and did not in the baseline", improvements(baseline, results))
	report("fail now, and passed in the baseline", worse)
	if write {
		merged := results
		if run != "" {
			merged = baseline.with(results)
		}
		return merged.write(baselinePath)
	}
	if len(worse) > 0 {
		return fmt.Errorf("%d regressions; the logs are in %s", len(worse), logs)
	}
	return nil
}

// regressions names what passed in the baseline and does not now. What did not run at all counts when nothing filtered
// it out: a run of everything, or of groups that lost a subtest.
func regressions(baseline, results table, run string) []test {
	var worse []test
	for t, was := range baseline {
		now, ran := results[t]
		if was != pass || now == pass {
			continue
		}
		if ran && now == fail || !ran && (run == "" || wholeGroupRan(results, t, run)) {
			worse = append(worse, t)
		}
	}
	return sorted(worse)
}

// wholeGroupRan reports whether the group of a missing subtest ran, and the filter did not choose among its subtests.
func wholeGroupRan(results table, t test, run string) bool {
	_, ran := results[t.group()]
	return ran && !strings.Contains(run, "/")
}

func improvements(baseline, results table) []test {
	var better []test
	for t, now := range results {
		if was, known := baseline[t]; now == pass && known && was != pass {
			better = append(better, t)
		}
	}
	return sorted(better)
}

func groupsOf(tests []test) []test {
	seen := map[test]bool{}
	var groups []test
	for _, t := range tests {
		if g := t.group(); !seen[g] {
			seen[g] = true
			groups = append(groups, g)
		}
	}
	return groups
}

// runAgain replaces the results of these groups by those of another run, one `go test` a package.
func runAgain(groups []test, results table, logs string) error {
	names := map[string][]string{}
	for _, g := range groups {
		names[g.pkg] = append(names[g.pkg], regexp.QuoteMeta(g.name))
	}
	for pkg, list := range names {
		again, err := runSuite([]string{pkg}, "^("+strings.Join(list, "|")+")$", logs)
		if err != nil {
			return err
		}
		for t := range results {
			if _, ran := again[t.group()]; ran {
				delete(results, t)
			}
		}
		for t, outcome := range again {
			results[t] = outcome
		}
	}
	return nil
}

func report(title string, tests []test) {
	if len(tests) == 0 {
		return
	}
	fmt.Printf("\n%d %s:\n", len(tests), title)
	for _, t := range tests {
		fmt.Printf("  %s %s\n", shortName(t.pkg), t.name)
	}
}

func sorted(tests []test) []test {
	sort.Slice(tests, func(i, j int) bool { return tests[i].less(tests[j]) })
	return tests
}
