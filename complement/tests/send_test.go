package tests

import (
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

// A client that got no answer sends again with the same transaction id, perhaps while the first request is still under
// way: one event results, and every request is answered with its id.
func TestSendWithSameTransactionIDIsOneEvent(t *testing.T) {
	const requests = 20
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	alice := deployment.Register(t, "hs1", helpers.RegistrationOpts{LocalpartSuffix: "txn"})
	roomID := alice.MustCreateRoom(t, map[string]any{"preset": "private_chat"})
	path := []string{"_matrix", "client", "v3", "rooms", roomID, "send", "m.room.message", "the-same"}
	body := map[string]any{"msgtype": "m.text", "body": "once"}

	eventIDs := make([]string, requests)
	var all sync.WaitGroup
	for i := range requests {
		all.Go(func() {
			res := alice.Do(t, "PUT", path, client.WithJSONBody(t, body))
			if res.StatusCode != http.StatusOK {
				t.Errorf("request %d: %s", i, res.Status)
				return
			}
			eventIDs[i] = gjson.GetBytes(client.ParseJSON(t, res), "event_id").Str
		})
	}
	all.Wait()
	again := alice.MustDo(t, "PUT", path, client.WithJSONBody(t, body))
	last := gjson.GetBytes(client.ParseJSON(t, again), "event_id").Str
	must.NotEqual(t, last, "", "the answer names no event")
	for _, id := range eventIDs {
		must.Equal(t, id, last, "requests with one transaction id name different events")
	}

	messages := alice.MustDo(t, "GET", []string{"_matrix", "client", "v3", "rooms", roomID, "messages"},
		client.WithQueries(url.Values{"dir": {"b"}, "limit": {"100"}}))
	sent := 0
	for _, event := range gjson.GetBytes(client.ParseJSON(t, messages), "chunk").Array() {
		if event.Get("type").Str == "m.room.message" {
			sent++
		}
	}
	must.Equal(t, sent, 1, "messages in the room")
}

// Transaction ids belong to one device and one endpoint: the same id from another login is another event.
func TestTransactionIDsOfTwoDevicesAreApart(t *testing.T) {
	deployment := complement.Deploy(t, 1)
	defer deployment.Destroy(t)
	phone := deployment.Register(t, "hs1", helpers.RegistrationOpts{LocalpartSuffix: "txn", Password: "superuser"})
	laptop := deployment.Login(t, "hs1", phone, helpers.LoginOpts{Password: "superuser"})
	roomID := phone.MustCreateRoom(t, map[string]any{"preset": "private_chat"})
	path := []string{"_matrix", "client", "v3", "rooms", roomID, "send", "m.room.message", "the-same"}
	body := map[string]any{"msgtype": "m.text", "body": "twice"}

	first := phone.MustDo(t, "PUT", path, client.WithJSONBody(t, body))
	second := laptop.MustDo(t, "PUT", path, client.WithJSONBody(t, body))
	must.NotEqual(t, gjson.GetBytes(client.ParseJSON(t, first), "event_id").Str,
		gjson.GetBytes(client.ParseJSON(t, second), "event_id").Str, "two devices share a transaction id")
}
