package tests

import (
	"fmt"
	"net/http"
	"net/url"
	"sync"
	"testing"

	"github.com/matrix-org/complement"
	"github.com/matrix-org/complement/client"
	"github.com/matrix-org/complement/helpers"
	"github.com/matrix-org/complement/must"
	"github.com/tidwall/gjson"
)

const atOnce = 20

// answer is what one of several requests at once got.
type answer struct {
	status int
	body   gjson.Result
}

// together sends the requests at the same time and gives their answers in order.
func together(t *testing.T, request func(i int) *http.Response) []answer {
	t.Helper()
	answers := make([]answer, atOnce)
	var all sync.WaitGroup
	for i := range answers {
		all.Go(func() {
			res := request(i)
			answers[i] = answer{res.StatusCode, gjson.ParseBytes(client.ParseJSON(t, res))}
		})
	}
	all.Wait()
	return answers
}

// oneWinner fails unless one request succeeded and every other was refused so; it gives the winner.
func oneWinner(t *testing.T, answers []answer, status int, errcode string) int {
	t.Helper()
	winner := -1
	for i, a := range answers {
		switch {
		case a.status == http.StatusOK && winner >= 0:
			t.Fatalf("requests %d and %d both succeeded", winner, i)
		case a.status == http.StatusOK:
			winner = i
		case a.status != status || errcode != "" && a.body.Get("errcode").Str != errcode:
			t.Errorf("request %d was answered %d %s, not %d %s", i, a.status, a.body.Raw, status, errcode)
		}
	}
	if winner < 0 {
		t.Fatalf("no request succeeded: %v", answers[0].body.Raw)
	}
	return winner
}

func TestAliasClaimedByManyHasOneWinner(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{LocalpartSuffix: "alias"})
	server := string(deployment.GetFullyQualifiedHomeserverName(t, "hs1"))
	roomIDs := make([]string, atOnce)
	for i := range roomIDs {
		roomIDs[i] = alice.MustCreateRoom(t, map[string]any{})
	}

	alias := fmt.Sprintf("#coveted-%s:%s", roomIDs[0][1:6], server)
	path := []string{"_matrix", "client", "v3", "directory", "room", alias}
	winner := oneWinner(t, together(t, func(i int) *http.Response {
		return alice.Do(t, "PUT", path, client.WithJSONBody(t, map[string]any{"room_id": roomIDs[i]}))
	}), http.StatusConflict, "")
	found := gjson.ParseBytes(client.ParseJSON(t, alice.MustDo(t, "GET", path)))
	must.Equal(t, found.Get("room_id").Str, roomIDs[winner], "the room of the alias")

	again := alice.Do(t, "PUT", path, client.WithJSONBody(t, map[string]any{"room_id": roomIDs[winner]}))
	must.Equal(t, again.StatusCode, http.StatusConflict, "claiming it once more for the same room")

	local := fmt.Sprintf("also-%s", roomIDs[0][1:6])
	oneWinner(t, together(t, func(int) *http.Response {
		return alice.CreateRoom(t, map[string]any{"room_alias_name": local})
	}), http.StatusBadRequest, "M_ROOM_IN_USE")
}

func TestUserNameClaimedByManyHasOneWinner(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	nobody := deployment.UnauthenticatedClient(t, "hs1")
	body := map[string]any{
		"username": "coveted",
		"password": "only-one-will-have-it",
		"auth":     map[string]any{"type": "m.login.dummy"},
	}
	oneWinner(t, together(t, func(int) *http.Response {
		return nobody.Do(t, "POST", []string{"_matrix", "client", "v3", "register"}, client.WithJSONBody(t, body))
	}), http.StatusBadRequest, "M_USER_IN_USE")
}

// The id of a room of version 12 is the hash of its create event, which must not make two equal rooms one.
func TestRoomsMadeAtOnceAreApart(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{LocalpartSuffix: "rooms"})
	for _, version := range []string{"11", "12"} {
		t.Run(version, func(t *testing.T) {
			seen := map[string]bool{}
			for _, a := range together(t, func(int) *http.Response {
				return alice.CreateRoom(t, map[string]any{"room_version": version})
			}) {
				must.Equal(t, a.status, http.StatusOK, a.body.Raw)
				seen[a.body.Get("room_id").Str] = true
			}
			must.Equal(t, len(seen), atOnce, "rooms")
		})
	}
}

// A reader who syncs while many write sees every event once, and in the order of the room.
func TestSyncChainMissesAndRepeatsNothing(t *testing.T) {
	const messagesEach = 10
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{LocalpartSuffix: "reader"})
	roomID := alice.MustCreateRoom(t, map[string]any{})
	filter := `{"room":{"timeline":{"limit":1000,"types":["m.room.message"]}}}`
	_, since := alice.MustSync(t, client.SyncReq{Filter: filter, TimeoutMillis: "0"})

	written := make(chan []answer)
	go func() {
		var all []answer
		for n := range messagesEach {
			all = append(all, together(t, func(i int) *http.Response {
				path := []string{"_matrix", "client", "v3", "rooms", roomID, "send", "m.room.message", fmt.Sprintf("%d-%d", n, i)}
				return alice.Do(t, "PUT", path, client.WithJSONBody(t, map[string]any{"msgtype": "m.text", "body": "x"}))
			})...)
		}
		written <- all
	}()
	var read []string
	var sent []answer
	for done, quiet := false, 0; quiet < 2; {
		news, next := alice.MustSync(t, client.SyncReq{Since: since, Filter: filter, TimeoutMillis: "200"})
		since = next
		timeline := news.Get("rooms.join." + client.GjsonEscape(roomID) + ".timeline")
		must.Equal(t, timeline.Get("limited").Bool(), false, "limited")
		for _, event := range timeline.Get("events").Array() {
			read = append(read, event.Get("event_id").Str)
		}
		select {
		case sent = <-written:
			done = true
		default:
		}
		if quiet++; !done || timeline.Get("events.#").Int() > 0 {
			quiet = 0
		}
	}

	for _, a := range sent {
		must.Equal(t, a.status, http.StatusOK, a.body.Raw)
	}
	page := gjson.ParseBytes(client.ParseJSON(t, alice.MustDo(t, "GET", []string{"_matrix", "client", "v3", "rooms", roomID, "messages"},
		client.WithQueries(url.Values{"dir": {"f"}, "limit": {"1000"}, "filter": {`{"types":["m.room.message"]}`}}))))
	var room []string
	for _, event := range page.Get("chunk").Array() {
		room = append(room, event.Get("event_id").Str)
	}
	must.Equal(t, len(read), atOnce*messagesEach, "events read through sync")
	must.Equal(t, fmt.Sprint(read), fmt.Sprint(room), "the order of sync, and of the room")
}
