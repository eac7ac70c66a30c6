// Who is signed in: a token in this tab's session storage, got by the one-time code of a link.

const KEY = "reliant.access_token";
const CHAT = "reliant.chat";

export function token(): string | null {
  return sessionStorage.getItem(KEY);
}

export function keep(accessToken: string): void {
  sessionStorage.setItem(KEY, accessToken);
}

export function forget(): void {
  sessionStorage.removeItem(KEY);
}

/** The chat to open again after a reload. */
export function lastChat(): string | null {
  return sessionStorage.getItem(CHAT);
}

export function keepChat(id: string): void {
  sessionStorage.setItem(CHAT, id);
}

/** The code of a link `…#code=…` or a code by itself. */
export function codeOf(text: string): string | undefined {
  const trimmed = text.trim();
  const inLink = /[#&?]code=([^&\s]+)/.exec(trimmed)?.[1];
  if (inLink) return decodeURIComponent(inLink);
  return /^[\w-]+$/.test(trimmed) ? trimmed : undefined;
}

/** Takes the code out of the address, so that it is neither bookmarked nor shared. */
export function takeCodeFromAddress(): string | undefined {
  if (!location.hash.includes("code=")) return undefined;
  const code = codeOf(location.hash);
  history.replaceState(null, "", location.pathname + location.search);
  return code;
}
