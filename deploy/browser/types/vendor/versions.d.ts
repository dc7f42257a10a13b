export const ORT_VERSION: string;
