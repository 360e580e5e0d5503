// What a person with matrix-js-sdk does with files, previews, push rules and pushers. Files lie in a directory that is shared with
// who drives the client.
import { readFile, writeFile } from "node:fs/promises";
import * as sdk from "matrix-js-sdk";

// Fetches what the library names a URL for, as Element Web does: by the endpoints that ask for a token, with the token in the header.
async function fetched(client, url, to) {
  const answer = await fetch(url, { headers: { Authorization: `Bearer ${client.getAccessToken()}` } });
  if (!answer.ok) throw new Error(`${answer.status} ${await answer.text()}`);
  await writeFile(to, Buffer.from(await answer.arrayBuffer()));
  return { type: answer.headers.get("content-type"), disposition: answer.headers.get("content-disposition") };
}

// The verbs of `mediaCommands(client)`, of which `client` gives the client that has logged in.
export const mediaCommands = (client) => ({
  async upload({ path, type, name }) {
    return { uri: (await client().uploadContent(await readFile(path), { type, name })).content_uri };
  },
  download: ({ uri, to }) => fetched(client(), client().mxcUrlToHttp(uri, undefined, undefined, undefined, false, true, true), to),
  thumbnail: ({ uri, width, height, method, to }) =>
    fetched(client(), client().mxcUrlToHttp(uri, width, height, method, false, true, true), to),
  async upload_max() {
    return { bytes: (await client().getMediaConfig(true))["m.upload.size"] };
  },
  set_avatar: ({ uri }) => client().setAvatarUrl(uri),
  async avatar({ user }) {
    return { uri: (await client().getProfileInfo(user, "avatar_url")).avatar_url };
  },
  // The avatar by which the member list of a room shows somebody.
  async avatar_in({ room, user }) {
    return { uri: client().getRoom(room)?.getMember(user)?.getMxcAvatarUrl() ?? null };
  },
  preview: ({ url }) => client().getUrlPreview(url, Date.now()),

  set_pusher: ({ pusher }) => client().setPusher(pusher),
  async pushers() {
    return (await client().getPushers()).pushers;
  },
  add_rule: ({ kind, rule, body }) => client().addPushRule("global", kind, rule, body),
  enable_rule: ({ kind, rule, on }) => client().setPushRuleEnabled("global", kind, rule, on),
  set_actions: ({ kind, rule, actions }) => client().setPushRuleActions("global", kind, rule, actions),
  delete_rule: ({ kind, rule }) => client().deletePushRule("global", kind, rule),
  // A rule as the server has it now, or null.
  async rule({ kind, rule }) {
    const rules = await client().getPushRules();
    return rules.global[kind]?.find((it) => it.rule_id === rule) ?? null;
  },
  // Whether the rule came with the client's sync.
  async rule_known({ kind, rule }) {
    return (client().pushRules?.global[kind] ?? []).some((it) => it.rule_id === rule);
  },
  // What the client itself makes of an event, by the rules that came with its sync.
  async judged({ room, event }) {
    const found = client().getRoom(room).findEventById(event);
    return found && client().getPushActionsForEvent(found, true);
  },
  async unread({ room }) {
    const of = (kind) => client().getRoom(room).getUnreadNotificationCount(kind) ?? 0;
    return [of("total"), of("highlight")];
  },
  // All highlights, the newest first, in pages of two, by the timeline in which Element Web shows them.
  async highlights() {
    const set = new sdk.EventTimelineSet(undefined, { timelineSupport: true });
    client().setNotifTimelineSet(set);
    const timeline = set.getLiveTimeline();
    timeline.setPaginationToken("", sdk.EventTimeline.BACKWARDS);
    while (await client().paginateEventTimeline(timeline, { backwards: true, limit: 2 }));
    return timeline
      .getEvents()
      .map((event) => event.getId())
      .reverse();
  },
  notifications: ({ query }) => client().http.authedRequest("GET", "/notifications", query),
});
