// A person who follows sliding sync with matrix-js-sdk (its SlidingSync, as Element Web uses it), driven by slide.py through lines of
// JSON: commands in, answers out, and a whole view of what the person sees whenever it changes.
import * as sdk from "matrix-js-sdk";
import { SlidingSync } from "matrix-js-sdk/lib/sliding-sync.js";
import { obey, tell } from "./obey.mjs";

const baseUrl = process.argv[2];
const broken = (problem) => tell({ broken: String(problem?.stack ?? problem) });
process.on("uncaughtException", broken);
process.on("unhandledRejection", broken);

const state = [
  ["m.room.name", ""],
  ["m.room.topic", ""],
  ["m.room.member", "$ME"],
  ["m.room.member", "$LAZY"],
  ["m.room.power_levels", ""],
];
const list = (first, last) => ({ ranges: [[first, last]], timeline_limit: 1, required_state: [["m.room.name", ""], ["m.room.topic", ""], ["m.room.member", "$ME"]] });
let client = sdk.createClient({ baseUrl });
let sliding;
let shown = "";
const opened = new Set();

function view() {
  const rooms = client.getRooms().sort((a, b) => (b.getBumpStamp() ?? 0) - (a.getBumpStamp() ?? 0));
  const of = (membership) => rooms.filter((room) => room.getMyMembership() === membership);
  const unread = {};
  for (const room of of("join"))
    unread[room.roomId] = ["total", "highlight"].map((kind) => room.getUnreadNotificationCount(kind));
  const said = {}, topics = {};
  for (const id of opened) {
    const room = client.getRoom(id);
    const bodies = room?.getLiveTimeline().getEvents().map((event) => event.getContent().body);
    said[id] = bodies?.filter((body) => body) ?? [];
    topics[id] = room?.currentState.getStateEvents("m.room.topic", "")?.getContent().topic;
  }
  const ids = (some) => some.map((room) => room.roomId);
  return { count: sliding.getListData("all")?.joinedCount, rooms: ids(of("join")), invites: ids(of("invite")), unread, said, topics };
}

function show() {
  const now = JSON.stringify(view());
  if (now !== shown) tell({ view: JSON.parse((shown = now)) });
}

const commands = {
  async login({ user, password }) {
    const identifier = { type: "m.id.user", user };
    const answer = await client.loginRequest({ type: "m.login.password", identifier, password });
    const { access_token: accessToken, user_id: userId, device_id: deviceId } = answer;
    client = sdk.createClient({ baseUrl, accessToken, userId, deviceId, timelineSupport: true });
    const subscription = { timeline_limit: 20, required_state: state };
    sliding = new SlidingSync(baseUrl, new Map([["all", list(0, 29)]]), subscription, client, 20_000);
    await client.startClient({ slidingSync: sliding, lazyLoadMembers: true, threadSupport: true });
    setInterval(show, 20);
  },
  grow: () => sliding.setListRanges("all", [[0, 99]]),
  open({ room }) {
    opened.add(room);
    sliding.modifyRoomSubscriptions(new Set(opened));
  },
  accept: async ({ room }) => void (await client.joinRoom(room)),
  // This client takes no part in subscriptions to threads.
  thread: () => "unknown",
};

await obey(commands);
client.stopClient();
process.exit(0);
